//! Checks whether callers may make their calls.

use std::sync::Arc;

use super::Api;
use crate::{
    access::{Action, Caller, Denied, Policy, What},
    audit::record::{Operation, Record},
    run::{Error, attach::Name, listing},
};
use polydev_proto::provider::Provider;

impl Api {
    /// Whether the caller may do this. A denial is recorded, and so is a call that needs `scale` or
    /// `credentials`.
    pub(super) fn check(&self, caller: &Caller, action: Action) -> Result<(), Error> {
        self.policy(caller, action).map(drop)
    }

    /// As [`Self::check`]; returns what the caller's role says about runs.
    pub(super) fn policy(&self, caller: &Caller, action: Action) -> Result<Arc<Policy>, Error> {
        let record = || Record::of(caller, action);
        let policy = self.access.policy(caller, action);
        let policy = policy.map_err(|denied| self.denied(record(), denied))?;
        match action {
            Action::Scale { .. } | Action::Credentials { .. } => self.audit.record(&record())?,
            // What is done with the run is recorded.
            Action::Look | Action::Run { .. } | Action::Inject { .. } | Action::Unbound { .. } => {}
        }
        Ok(policy)
    }

    /// Records that something is denied.
    pub(super) fn denied(&self, record: Record, denied: Denied) -> Error {
        let record = record.denied(&denied.to_string());
        match self.audit.record(&record) {
            Ok(()) => denied.into(),
            Err(error) => error.into(),
        }
    }

    /// Whether the caller may have this existing run, for this operation, which is recorded.
    pub(super) async fn check_run(
        &self,
        caller: &Caller,
        name: &Name,
        operation: Operation,
    ) -> Result<(), Error> {
        self.may_have(caller, name).await?;
        let record = Record::allowed(caller, operation).user(name.user_id.as_str());
        self.audit.record(&record.run(&name.run_id.to_string()))?;
        Ok(())
    }

    async fn may_have(&self, caller: &Caller, name: &Name) -> Result<(), Error> {
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
            return self.check(caller, run(None));
        }
        // If the driver did not record the run's provider, the caller needs the right to all
        // providers.
        let found = listing::get(&self.view, name).await?;
        self.check(caller, run(found.run.provider.parse().ok()))
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
        self.check(caller, run)?;
        let record = Record::allowed(caller, Operation::List).user(user_id);
        self.audit.record(&record.provider(provider))?;
        Ok(())
    }

    /// Whether the caller may manage the credentials of a user for a provider. Empty names stand
    /// for all.
    pub(super) fn check_credentials(
        &self,
        caller: &Caller,
        user_id: &str,
        provider: &str,
    ) -> Result<(), Error> {
        let credentials = Action::Credentials {
            user_id: Some(user_id).filter(|user_id| !user_id.is_empty()),
            // An unknown provider is refused later, for that reason.
            provider: provider.parse().ok(),
        };
        self.check(caller, credentials)
    }
}
