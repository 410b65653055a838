//! Whether callers may do what they ask for.

use super::Api;
use crate::{
    access::{Action, Caller},
    run::{Error, attach::Name, listing},
};
use polydev_proto::provider::Provider;

impl Api {
    /// Whether the caller may. Calls that change something are logged with the caller's name.
    pub(super) fn check(&self, caller: &Caller, action: Action) -> Result<(), Error> {
        if let Err(denied) = self.access.check(caller, action) {
            tracing::warn!(%denied, "denied");
            return Err(denied.into());
        }
        match action {
            Action::Scale { .. } | Action::Credentials { .. } => {
                tracing::info!(%caller, %action, "allowed");
            }
            Action::Look | Action::Run { .. } => {}
        }
        Ok(())
    }

    /// Whether the caller may have a run that exists.
    pub(super) async fn check_run(&self, caller: &Caller, name: &Name) -> Result<(), Error> {
        let providers = self.access.providers_of(caller, &name.user_id);
        let run = |provider| Action::Run {
            user_id: Some(&name.user_id),
            provider,
        };
        if providers.len() == Provider::all().count() {
            return Ok(());
        }
        if providers.is_empty() {
            return self.check(caller, run(None));
        }
        // A run whose driver did not note the provider needs the right to all providers.
        let found = listing::get(&self.view, name).await?;
        self.check(caller, run(found.run.provider.parse().ok()))
    }

    /// Runs of a user for a provider; an empty name stands for all.
    pub(super) fn check_runs(
        &self,
        caller: &Caller,
        user_id: &str,
        provider: &str,
    ) -> Result<(), Error> {
        let run = Action::Run {
            user_id: Some(user_id).filter(|user_id| !user_id.is_empty()),
            // An unknown provider is refused later, for that reason.
            provider: provider.parse().ok(),
        };
        self.check(caller, run)
    }

    /// Credentials of a user for a provider; an empty name stands for all.
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
