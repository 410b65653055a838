//! Checks whether callers may make their calls.

use std::sync::Arc;

use super::Api;
use crate::{
    access::{Action, Caller, Policy, What},
    run::{Error, attach::Name, listing},
};
use polydev_proto::provider::Provider;

impl Api {
    /// Whether the caller may do this. A denial is logged with the caller and where it is, and so
    /// is a call that needs `scale` or `credentials`.
    pub(super) fn check(&self, caller: &Caller, action: Action) -> Result<(), Error> {
        self.policy(caller, action).map(drop)
    }

    /// As [`Self::check`]; returns what the caller's role says about runs.
    pub(super) fn policy(&self, caller: &Caller, action: Action) -> Result<Arc<Policy>, Error> {
        let from = caller.origin;
        let policy = self.access.policy(caller, action).inspect_err(|denied| {
            tracing::warn!(%denied, %from, "denied");
        })?;
        match action {
            Action::Scale { .. } | Action::Credentials { .. } => {
                tracing::info!(%caller, %from, %action, "allowed");
            }
            Action::Look | Action::Run { .. } | Action::Inject { .. } | Action::Unbound { .. } => {}
        }
        Ok(policy)
    }

    /// Whether the caller may have this existing run, to do `what` with it. The log says who did.
    pub(super) async fn check_run(
        &self,
        caller: &Caller,
        name: &Name,
        what: &'static str,
    ) -> Result<(), Error> {
        self.may_have(caller, name).await?;
        let (run_id, user_id, from) = (&name.run_id, &name.user_id, caller.origin);
        tracing::info!(%run_id, %user_id, %caller, %from, what, "run");
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
    /// The log says who did.
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
        let from = caller.origin;
        tracing::info!(user_id, provider, %caller, %from, what = "list", "runs");
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
