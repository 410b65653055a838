//! Who calls, and whether he may do what he asks for.

use tonic::Request;

use super::Service;
use crate::{
    access::{Action, Caller},
    provider::Provider,
    run::{Error, attach::Name, listing},
};

/// Who is at the other end.
pub(super) fn caller<T>(request: &Request<T>) -> Caller {
    let caller = request.extensions().get::<Caller>();
    // Whatever comes in has one; without it, it is nobody who has a role.
    caller.cloned().unwrap_or_else(|| Caller(String::new()))
}

impl Service {
    /// Whether the caller may; what changes something is in the log with his name.
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
        // One whose driver did not note the provider is nobody's in particular.
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
            // One that there is not is refused for that.
            provider: provider.parse().ok(),
        };
        self.check(caller, run)
    }

    /// Credentials of a user for a provider; an empty name stands for all.
    pub(super) fn check_credentials<T>(
        &self,
        request: &Request<T>,
        user_id: &str,
        provider: &str,
    ) -> Result<(), Error> {
        let credentials = Action::Credentials {
            user_id: Some(user_id).filter(|user_id| !user_id.is_empty()),
            // One that there is not is refused for that.
            provider: provider.parse().ok(),
        };
        self.check(&caller(request), credentials)
    }
}
