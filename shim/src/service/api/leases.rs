//! The calls that keep a slot for a later run: `Allocate` and `Release`.

use polydev_proto::runtime::{AllocateRequest, AllocateResponse, ReleaseRequest, ReleaseResponse};

use super::Api;
use crate::{
    access::{Action, Caller, What},
    run::{
        Error,
        attach::Name,
        lease::{self, Wanted},
    },
};

impl Api {
    pub(in crate::service) async fn allocate(
        &self,
        caller: &Caller,
        request: AllocateRequest,
    ) -> Result<AllocateResponse, Error> {
        let wanted = Wanted::parse(request)?;
        let (user_id, provider) = (wanted.user_id.clone(), wanted.provider);
        let run = Action::Run {
            what: What::Existing,
            user_id: Some(user_id.as_str()),
            provider: Some(provider),
        };
        let role = self.policy(caller, run)?;
        self.user_rate.check(user_id.as_str())?;
        let allocate = lease::allocate(&self.view, &self.queue, wanted, role);
        let lease = self.unless_stopping(allocate).await?;
        let from = caller.origin;
        tracing::info!(lease_id = lease.lease_id, %user_id, %caller, %from, %provider, "lease");
        let lease = Some(lease);
        Ok(AllocateResponse { lease })
    }

    pub(in crate::service) async fn release(
        &self,
        caller: &Caller,
        ReleaseRequest { lease_id, user_id }: ReleaseRequest,
    ) -> Result<ReleaseResponse, Error> {
        let name = Name::parse_lease(&lease_id, user_id)?;
        let kept = self.view.leased(name.run_id);
        let run = Action::Run {
            what: What::Existing,
            user_id: Some(name.user_id.as_str()),
            provider: kept.as_ref().and_then(|kept| kept.provider.parse().ok()),
        };
        self.check(caller, run)?;
        lease::release(&self.view, kept, &name).await?;
        let (lease_id, user_id, from) = (&name.run_id, &name.user_id, caller.origin);
        tracing::info!(%lease_id, %user_id, %caller, %from, "lease released");
        Ok(ReleaseResponse {})
    }
}
