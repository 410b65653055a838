//! Checks whether callers may make their calls.

use std::sync::Arc;

use super::Api;
use polydev_policy::rules::RunFacts;

use crate::{
    access::{Action, Caller, Denied, Policy, What},
    audit::record::{Operation, Record},
    policy::Leave,
    run::{Error, attach::Name, listing},
};
use polydev_proto::provider::Provider;

impl Api {
    /// Whether the caller may do this. A denial is recorded.
    pub(super) fn check(
        &self,
        caller: &Caller,
        action: Action,
        record: &Record,
    ) -> Result<(), Error> {
        self.role(caller, action, record).map(drop)
    }

    /// As [`Self::check`]; it is recorded that the caller may.
    pub(super) fn permit(
        &self,
        caller: &Caller,
        action: Action,
        record: &Record,
    ) -> Result<(), Error> {
        self.check(caller, action, record)?;
        Ok(self.audit.record(record)?)
    }

    /// As [`Self::check`]; returns what the caller's role says about runs.
    pub(super) fn role(
        &self,
        caller: &Caller,
        action: Action,
        record: &Record,
    ) -> Result<Arc<Policy>, Error> {
        let policy = self.access.policy(caller, action);
        policy.map_err(|denied| self.denied(record, denied))
    }

    /// Records that something is denied.
    pub(super) fn denied(&self, record: &Record, denied: Denied) -> Error {
        let record = record.denied(&denied.to_string());
        match self.audit.record(&record) {
            Ok(()) => denied.into(),
            Err(error) => error.into(),
        }
    }

    /// Asks the operator's rules about a run. Returns the record with what they have decided, and what
    /// is left to do; what they block is recorded here.
    pub(super) fn decide(
        &self,
        record: Record,
        facts: Option<&RunFacts>,
    ) -> Result<(Record, Leave), Error> {
        let decided = facts.and_then(|facts| self.policy.decide(facts));
        let checked = decided
            .as_ref()
            .map_or(Ok(Leave::Given), |decided| decided.check("run"));
        let record = record.decided(decided);
        match checked {
            Ok(leave) => Ok((record, leave)),
            Err(refused) => {
                self.audit.record(&record.denied(&refused.to_string()))?;
                Err(refused.into())
            }
        }
    }

    /// Whether the caller may have this existing run, for this operation, which is recorded.
    pub(super) async fn check_run(
        &self,
        caller: &Caller,
        name: &Name,
        operation: Operation,
    ) -> Result<(), Error> {
        let record = Record::new(caller, operation)
            .user(name.user_id.as_str())
            .run(&name.run_id.to_string());
        self.may_have(caller, name, &record).await?;
        Ok(self.audit.record(&record)?)
    }

    async fn may_have(&self, caller: &Caller, name: &Name, record: &Record) -> Result<(), Error> {
        let providers = self.access.providers_of(caller, name.user_id.as_str());
        let run = |provider| Action::Run {
            what: What::Existing,
            user_id: Some(name.user_id.as_str()),
            provider,
        };
        if providers.len() == Provider::all().count() {
            return Ok(());
        }
        if providers.is_empty() {
            return self.check(caller, run(None), record);
        }
        // If the driver did not record the run's provider, the caller needs the right to all
        // providers.
        let found = listing::get(&self.view, name).await?;
        self.check(caller, run(found.run.provider.parse().ok()), record)
    }

    /// Whether the caller may have the runs of a user for a provider. Empty names stand for all.
    /// It is recorded.
    pub(super) fn check_runs(
        &self,
        caller: &Caller,
        user_id: &str,
        provider: &str,
    ) -> Result<(), Error> {
        let run = Action::Run {
            what: What::Existing,
            user_id: Some(user_id).filter(|user_id| !user_id.is_empty()),
            // An unknown provider is refused later, for that reason.
            provider: provider.parse().ok(),
        };
        let record = Record::new(caller, Operation::List);
        self.permit(caller, run, &record.user(user_id).provider(provider))
    }

    /// Whether the caller may manage the credentials of a user for a provider. Empty names stand
    /// for all. It is recorded.
    pub(super) fn check_credentials(
        &self,
        caller: &Caller,
        user_id: &str,
        provider: &str,
        operation: Operation,
    ) -> Result<(), Error> {
        let credentials = Action::Credentials {
            user_id: Some(user_id).filter(|user_id| !user_id.is_empty()),
            // An unknown provider is refused later, for that reason.
            provider: provider.parse().ok(),
        };
        let record = Record::new(caller, operation);
        self.permit(
            caller,
            credentials,
            &record.user(user_id).provider(provider),
        )
    }
}
