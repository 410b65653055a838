//! The calls about approvals: `ListApprovals`, `GetApproval`, `Approve`, `Deny` and `WatchApprovals`.

mod encode;

use futures_util::Stream;
use polydev_proto::{
    provider::Provider,
    runtime::{
        ApproveRequest, ApproveResponse, DenyRequest, DenyResponse, GetApprovalRequest,
        GetApprovalResponse, ListApprovalsRequest, ListApprovalsResponse, WatchApprovalsRequest,
        WatchApprovalsResponse,
    },
};
use tokio::sync::{broadcast::error::RecvError, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use uuid::Uuid;

use super::Api;
use crate::{
    access::{Access, Action, Caller},
    approval::{Approval, MAX_COMMENT},
    audit::record::{Operation, Record},
    run::{
        Error,
        request::{Invalid, parse_user},
    },
};

use encode::{encode, encode_whole};

/// How many changes may wait for their caller.
const MAX_CHANGES: usize = 16;

/// Which approvals a caller wants to see.
#[derive(Debug, Clone)]
struct Filter {
    user_id: Option<String>,
    provider: Option<Provider>,
}

impl Filter {
    fn parse(user_id: String, provider: &str) -> Result<Self, Invalid> {
        let user_id = Some(user_id).filter(|user_id| !user_id.is_empty());
        let user_id = user_id.map(parse_user).transpose()?;
        let provider = Some(provider).filter(|provider| !provider.is_empty());
        Ok(Self {
            user_id: user_id.map(String::from),
            provider: provider.map(str::parse).transpose()?,
        })
    }

    /// Whether this is one of them, and the caller may see it.
    fn has(&self, access: &Access, caller: &Caller, approval: &Approval) -> bool {
        let record = &approval.record;
        let is_users = self.user_id.is_none() || self.user_id == record.user_id;
        let name = self.provider.map(Provider::name);
        let is_providers = name.is_none() || name == record.provider.as_deref();
        is_users && is_providers && access.check(caller, action(record)).is_ok()
    }
}

/// To decide about what a record is of.
fn action(record: &Record) -> Action<'_> {
    Action::Approve {
        user_id: record.user_id.as_deref(),
        provider: record
            .provider
            .as_deref()
            .and_then(|provider| provider.parse().ok()),
    }
}

impl Api {
    pub(in crate::service) fn list_approvals(
        &self,
        caller: &Caller,
        ListApprovalsRequest { user_id, provider }: ListApprovalsRequest,
    ) -> Result<ListApprovalsResponse, Error> {
        let filter = self.see_approvals(caller, user_id, &provider)?;
        let all = self.turns.approvals.all().into_iter();
        let own = all.filter(|approval| filter.has(&self.access, caller, approval));
        Ok(ListApprovalsResponse {
            approvals: own.map(|approval| encode(&approval)).collect(),
        })
    }

    pub(in crate::service) fn get_approval(
        &self,
        caller: &Caller,
        GetApprovalRequest { approval_id }: GetApprovalRequest,
    ) -> Result<GetApprovalResponse, Error> {
        let (approval, subject) = self.turns.approvals.get(parse_id(&approval_id)?)?;
        self.may_decide(caller, &approval, Operation::SeeApprovals, true)?;
        Ok(GetApprovalResponse {
            approval: Some(encode_whole(&approval, &subject)),
        })
    }

    pub(in crate::service) fn approve(
        &self,
        caller: &Caller,
        ApproveRequest {
            approval_id,
            comment,
        }: ApproveRequest,
    ) -> Result<ApproveResponse, Error> {
        let approval = self.decide_approval(caller, &approval_id, true, comment)?;
        Ok(ApproveResponse {
            approval: Some(encode(&approval)),
        })
    }

    pub(in crate::service) fn deny(
        &self,
        caller: &Caller,
        DenyRequest {
            approval_id,
            comment,
        }: DenyRequest,
    ) -> Result<DenyResponse, Error> {
        let approval = self.decide_approval(caller, &approval_id, false, comment)?;
        Ok(DenyResponse {
            approval: Some(encode(&approval)),
        })
    }

    pub(in crate::service) fn watch_approvals(
        &self,
        caller: &Caller,
        WatchApprovalsRequest { user_id, provider }: WatchApprovalsRequest,
    ) -> Result<impl Stream<Item = WatchApprovalsResponse> + Send + use<>, Error> {
        let filter = self.see_approvals(caller, user_id, &provider)?;
        let (changes, told) = mpsc::channel(MAX_CHANGES);
        let (access, caller) = (self.access.clone(), caller.clone());
        let approvals = self.turns.approvals.clone();
        let watch = async move {
            let mut news = approvals.news();
            let mut next = approvals.all();
            let mut is_first = true;
            loop {
                next.retain(|approval| filter.has(&access, &caller, approval));
                if !next.is_empty() || is_first {
                    let approvals = next.iter().map(encode).collect();
                    let told = changes.send(WatchApprovalsResponse { approvals });
                    if told.await.is_err() {
                        return;
                    }
                }
                is_first = false;
                next = tokio::select! {
                    () = changes.closed() => return,
                    news = news.recv() => match news {
                        Ok(approval) => vec![approval],
                        // An end was missed: a new stream has what still waits.
                        Err(RecvError::Lagged(_) | RecvError::Closed) => return,
                    }
                };
            }
        };
        // The task ends when the caller disconnects or the shim stops.
        tokio::spawn(self.stop.clone().run_until_cancelled_owned(watch));
        Ok(ReceiverStream::new(told))
    }

    fn see_approvals(
        &self,
        caller: &Caller,
        user_id: String,
        provider: &str,
    ) -> Result<Filter, Error> {
        // Each one is checked later: a caller without any right to approve does not come here.
        let record = Record::new(caller, Operation::SeeApprovals);
        let record = record.user(&user_id).provider(provider);
        let filter = Filter::parse(user_id, provider)?;
        self.audit.record(&record)?;
        Ok(filter)
    }

    fn decide_approval(
        &self,
        caller: &Caller,
        approval_id: &str,
        approves: bool,
        comment: String,
    ) -> Result<Approval, Error> {
        let id = parse_id(approval_id)?;
        // Its caller may print it to a terminal.
        if comment.len() > MAX_COMMENT || comment.chars().any(char::is_control) {
            return Err(Error::Invalid(Invalid::Value {
                field: "comment",
                given: comment,
                allowed: "at most 1000 bytes without control characters",
            }));
        }
        let approvals = &self.turns.approvals;
        let (approval, _) = approvals.get(id)?;
        let operation = match approves {
            true => Operation::Approve,
            false => Operation::Deny,
        };
        self.may_decide(caller, &approval, operation, false)?;
        Ok(approvals.decide(caller, id, approves, comment)?)
    }

    /// Whether a role of the caller is for this approval. A denial is recorded; so is what is allowed, if
    /// it `is_recorded` here.
    fn may_decide(
        &self,
        caller: &Caller,
        approval: &Approval,
        operation: Operation,
        is_recorded: bool,
    ) -> Result<(), Error> {
        let wanted = &approval.record;
        let record = wanted.deciding(caller, operation, approval.id, "");
        self.check(caller, action(wanted), &record)?;
        if is_recorded {
            self.audit.record(&record)?;
        }
        Ok(())
    }
}

fn parse_id(approval_id: &str) -> Result<Uuid, Invalid> {
    approval_id.parse().map_err(|_| Invalid::Value {
        field: "approval_id",
        given: approval_id.to_owned(),
        allowed: "the UUID of an approval",
    })
}
