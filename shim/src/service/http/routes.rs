//! All paths, with their handlers and their descriptions in the OpenAPI document.

use std::sync::LazyLock;

use axum::{
    Json,
    response::{IntoResponse, Response},
    routing::on,
};
use serde_json::Value;

use super::{
    handlers, openapi,
    operation::{Answer, Method, Operation, Parameter},
};

const OF_USER: &[(&str, Parameter)] = &[("user_id", Parameter::Needed)];

/// All operations, in the order of the document.
pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        method: Method::Post,
        path: "/v1/runs",
        name: "startRun",
        summary: "Run one command or prompt, and stream its events as server-sent events. Each event has the name of a field of RunEvent. If the stream breaks, the caller continues with /v1/runs/{run_id}/events.",
        body: Some("SubmitJobRequest"),
        query: &[("detach", Parameter::Flag)],
        answer: Answer::Events(Some("SubmitJobResponse")),
        handler: |method| on(method, handlers::start),
    },
    Operation {
        method: Method::Post,
        path: "/v1/scripts",
        name: "runScript",
        summary: "Run a script in Python to its end, and return its outputs. If the caller closes the connection, the script is ended.",
        body: Some("RunScriptRequest"),
        query: &[],
        answer: Answer::Message("RunScriptResponse"),
        handler: |method| on(method, handlers::run_script),
    },
    Operation {
        method: Method::Get,
        path: "/v1/runs",
        name: "listRuns",
        summary: "The runs of all nodes in pages, the newest first. Commas separate the items of lists.",
        body: None,
        query: &[
            ("user_id", Parameter::Text),
            ("provider", Parameter::Text),
            ("states", Parameter::Text),
            ("page_size", Parameter::Of("ListRunsRequest")),
            ("page_token", Parameter::Text),
        ],
        answer: Answer::Message("ListRunsResponse"),
        handler: |method| on(method, handlers::list),
    },
    Operation {
        method: Method::Get,
        path: "/v1/runs/{run_id}",
        name: "getRun",
        summary: "One run, with its result if the run has ended.",
        body: None,
        query: OF_USER,
        answer: Answer::Message("GetRunResponse"),
        handler: |method| on(method, handlers::show),
    },
    Operation {
        method: Method::Get,
        path: "/v1/runs/{run_id}/events",
        name: "attachRun",
        summary: "The events of an existing run, from the beginning or after the event that the header Last-Event-ID names.",
        body: None,
        query: OF_USER,
        answer: Answer::Events(None),
        handler: |method| on(method, handlers::attach),
    },
    Operation {
        method: Method::Post,
        path: "/v1/runs/{run_id}/cancel",
        name: "cancelRun",
        summary: "End a run: SIGTERM at once, SIGKILL after the run's kill timeout.",
        body: Some("CancelRunRequest"),
        query: &[],
        answer: Answer::Message("CancelRunResponse"),
        handler: |method| on(method, handlers::cancel),
    },
    Operation {
        method: Method::Post,
        path: "/v1/leases",
        name: "allocate",
        summary: "Keep an idle slot for one later run.",
        body: Some("AllocateRequest"),
        query: &[],
        answer: Answer::Message("AllocateResponse"),
        handler: |method| on(method, handlers::allocate),
    },
    Operation {
        method: Method::Post,
        path: "/v1/leases/{lease_id}/release",
        name: "release",
        summary: "Release a lease before it expires.",
        body: Some("ReleaseRequest"),
        query: &[],
        answer: Answer::Message("ReleaseResponse"),
        handler: |method| on(method, handlers::release),
    },
    Operation {
        method: Method::Get,
        path: "/v1/approvals",
        name: "listApprovals",
        summary: "What waits for an approval at this shim, the oldest first.",
        body: None,
        query: &[("user_id", Parameter::Text), ("provider", Parameter::Text)],
        answer: Answer::Message("ListApprovalsResponse"),
        handler: |method| on(method, handlers::list_approvals),
    },
    Operation {
        method: Method::Get,
        path: "/v1/approvals/{approval_id}",
        name: "getApproval",
        summary: "One of them, with everything that is to be approved.",
        body: None,
        query: &[],
        answer: Answer::Message("GetApprovalResponse"),
        handler: |method| on(method, handlers::show_approval),
    },
    Operation {
        method: Method::Post,
        path: "/v1/approvals/{approval_id}/approve",
        name: "approve",
        summary: "Approve it: the run gets its slot in its turn, and the call is made.",
        body: Some("ApproveRequest"),
        query: &[],
        answer: Answer::Message("ApproveResponse"),
        handler: |method| on(method, handlers::approve),
    },
    Operation {
        method: Method::Post,
        path: "/v1/approvals/{approval_id}/deny",
        name: "deny",
        summary: "Deny it: the run ends, or the call is not made.",
        body: Some("DenyRequest"),
        query: &[],
        answer: Answer::Message("DenyResponse"),
        handler: |method| on(method, handlers::deny),
    },
    Operation {
        method: Method::Get,
        path: "/v1/pools",
        name: "listPools",
        summary: "The warm slots of every provider.",
        body: None,
        query: &[],
        answer: Answer::Message("ListPoolsResponse"),
        handler: |method| on(method, handlers::list_pools),
    },
    Operation {
        method: Method::Get,
        path: "/v1/pools/{provider}",
        name: "getPool",
        summary: "One provider's pool, slot by slot.",
        body: None,
        query: &[],
        answer: Answer::Message("GetPoolResponse"),
        handler: |method| on(method, handlers::show_pool),
    },
    Operation {
        method: Method::Get,
        path: "/v1/status",
        name: "getStatus",
        summary: "The nodes: the resources of each node, and how much of them is used.",
        body: None,
        query: &[],
        answer: Answer::Message("GetClusterStatusResponse"),
        handler: |method| on(method, handlers::status),
    },
    Operation {
        method: Method::Get,
        path: "/v1/openapi.json",
        name: "getOpenApi",
        summary: "This document.",
        body: None,
        query: &[],
        answer: Answer::Document,
        handler: |method| on(method, document),
    },
];

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| openapi::describe(OPERATIONS));

async fn document() -> Response {
    Json(&*DOCUMENT).into_response()
}
