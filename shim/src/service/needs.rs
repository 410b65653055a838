//! What a call may need, by its path.

use crate::access::Need;

/// `None` for what anyone may ask: health, reflection, the OpenAPI document, and paths that do not
/// exist.
pub(super) fn of(path: &str) -> Option<Need> {
    match path.strip_prefix("/polydev.runtime.v1.RuntimeService/") {
        Some(method) => grpc(method),
        None => http(path.strip_prefix("/v1/")?),
    }
}

fn grpc(method: &str) -> Option<Need> {
    Some(match method {
        "Run" | "RunScript" | "SubmitJob" | "Allocate" | "Release" | "Attach" | "CancelRun"
        | "GetRun" | "ListRuns" | "WatchRuns" => Need::Run,
        "ListPools" | "GetPool" | "WatchPools" | "GetClusterStatus" | "ListImages" => Need::Look,
        "ScalePool" | "DrainPool" | "ResumePool" => Need::Scale,
        "PruneImages" => Need::Images,
        "ListApprovals" | "GetApproval" | "Approve" | "Deny" | "WatchApprovals" => Need::Approve,
        "PutCredential" | "ListCredentials" | "DeleteCredential" | "RotateCredentials" => {
            Need::Credentials
        }
        _ => return None,
    })
}

fn http(path: &str) -> Option<Need> {
    Some(match path.split('/').next()? {
        "runs" | "scripts" | "leases" => Need::Run,
        "pools" | "status" => Need::Look,
        "approvals" => Need::Approve,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use polydev_proto::DESCRIPTORS;
    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::*;

    #[test]
    fn every_call_needs_something() {
        let files = FileDescriptorSet::decode(DESCRIPTORS).unwrap().file;
        let services = files.iter().flat_map(|file| &file.service);
        let calls = services
            .filter(|service| service.name() == "RuntimeService")
            .flat_map(|service| &service.method);
        let mut count = 0;
        for call in calls {
            let path = format!("/polydev.runtime.v1.RuntimeService/{}", call.name());
            assert!(of(&path).is_some(), "{path}");
            count += 1;
        }
        assert!(count >= 20);
        for path in super::super::http::paths() {
            let is_document = path == "/v1/openapi.json";
            assert_eq!(of(path).is_none(), is_document, "{path}");
        }
        assert_eq!(of("/grpc.health.v1.Health/Check"), None);
    }
}
