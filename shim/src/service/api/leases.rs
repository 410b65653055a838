//! The calls that keep a slot for a later run: `Allocate` and `Release`.

use polydev_proto::runtime::{AllocateRequest, AllocateResponse, ReleaseRequest, ReleaseResponse};

use super::Api;
use crate::{
    access::{Action, Caller, What},
    audit::record::{Operation, Record},
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
        let record = Record::new(caller, Operation::Lease).user(user_id.as_str());
        let record = record.provider(provider.name());
        let role = self.role(caller, run, &record)?;
        self.user_rate.check(user_id.as_str())?;
        self.audit.record(&record)?;
        let allocate = lease::allocate(&self.view, &self.turns.queue, wanted, role);
        let lease = self.unless_stopping(allocate).await?;
        tracing::info!(lease_id = lease.lease_id, %user_id, %caller, %provider, "lease");
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
        let record = Record::new(caller, Operation::Release).user(name.user_id.as_str());
        self.permit(caller, run, &record.run(&name.run_id.to_string()))?;
        lease::release(&self.view, kept, &name).await?;
        Ok(ReleaseResponse {})
    }
}
