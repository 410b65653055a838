use super::*;
use crate::{
    capability::{Capability, Grant, Grants},
    evaluate::{Gate, Settings},
    provenance::{Graph, NodeId, Source},
    rules::Rules,
    sink::{Limits, Risk, Sink, Sinks},
};
use proptest::prelude::*;

/// Of the seed's golden vectors: shorter than what [`Secrets::read`] takes.
fn golden_secret() -> Secrets {
    Secrets::golden("golden_secret")
}

fn secrets() -> Secrets {
    Secrets::read("a secret of this test").unwrap()
}

fn at(seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(1_900_000_000 + seconds).unwrap()
}

fn gate() -> Gate {
    let mut grants = Grants::default();
    grants.add(
        "tool",
        "run",
        Grant {
            capability: Capability::ProcessExec,
            allow: vec!["*".into()],
            deny: Vec::new(),
        },
    );
    let mut sinks = Sinks::default();
    sinks.add(Sink {
        tool: "tool".into(),
        action: "run".into(),
        risk: Risk::Low,
        rationale: String::new(),
        require_capability: Some(Capability::ProcessExec),
        block_untrusted_integrity: false,
        block_confidential_egress: false,
        metadata: Limits::default(),
    });
    Gate {
        sinks,
        grants,
        rules: Rules::builtin(),
        settings: Settings {
            expected_policy_hash: None,
            others: Value::Null,
        },
    }
}

/// A decision about a call with these arguments, and a token for it.
struct Case {
    graph: Graph,
    node: NodeId,
    arguments: Value,
}

impl Case {
    fn new(arguments: Value) -> Self {
        let mut graph = Graph::default();
        let node = graph.enter(Source::User, "read").unwrap();
        Self {
            graph,
            node,
            arguments,
        }
    }

    fn call(&self) -> Call<'_> {
        Call {
            caller: "test",
            tool: "tool",
            action: "run",
            target: "x",
            arguments: &self.arguments,
            node: &self.node,
        }
    }

    fn decision(&self) -> Decision {
        gate().decide(&self.graph, &self.call())
    }

    fn token(&self) -> Token {
        Token::issue(
            &self.decision(),
            &self.call(),
            false,
            &secrets(),
            &nonce(),
            300,
            at(0),
        )
    }

    fn redeem(
        &self,
        token: &Token,
        nonces: &mut Nonces,
        now: OffsetDateTime,
    ) -> Result<(), Invalid> {
        token.redeem(
            &self.decision(),
            &self.call(),
            false,
            &secrets(),
            nonces,
            now,
        )
    }
}

#[test]
fn a_token_has_the_signature_of_existing_programs() {
    let mut token = Token {
        tool: "demo_tool".into(),
        action: "run".into(),
        target_hash: canonical::sha256(b"read_status"),
        provenance_node_id: "0123456789abcdef0123456789abcdef".into(),
        policy_hash: "4df67e654e13aa77ecb683a337031b0c3b8b693f346f9ec221fccc1aa0e8df66".into(),
        issued_at: "2030-01-01T00:00:00+00:00".into(),
        expires_at: "2099-01-01T00:00:00+00:00".into(),
        nonce: "00112233445566778899aabbccddeeff".into(),
        algorithm: ALGORITHM.into(),
        contract_version: None,
        invocation_hash: None,
        arguments_hash: None,
        key_id: None,
        signature: String::new(),
    };
    assert_eq!(
        token.target_hash,
        "dbeee12e349f0b967137ec8eee4cf0278b7725509fa22a967e4b5ad035185c1c"
    );
    let signature = "11ca160f1b67a2237864377268ea17927fdd75d8fad2680cf185a9e128417596";
    assert_eq!(golden_secret().sign(&token.signed()), signature);
    token.signature = signature.into();
    token.check_signature(&golden_secret()).unwrap();
}

#[test]
fn contracts_have_the_hashes_of_existing_programs() {
    let node = NodeId(String::new());
    let hash = |tool, action, target, arguments: &Value| {
        let call = Call {
            caller: "",
            tool,
            action,
            target,
            arguments,
            node: &node,
        };
        canonical::hash(&contract::of(&call).unwrap())
    };
    let bash = json!({ "command": "ls /tmp", "env": { "B": "2", "A": "1" } });
    assert_eq!(
        hash("bash", "exec", "ls", &bash),
        "77ca856496040dd80964a488f079b9738d72d82dce3c8c26f12541a8cee82372"
    );
    let http = json!({
        "method": "POST",
        "headers": { "X-A": "1", "Content-Type": "application/json" },
        "body": { "status": "ok", "näme": "ü😀" },
    });
    assert_eq!(
        canonical::hash(&http["body"]),
        "746cc3a393f178c3267f7939fed8d7c5cd1550ce38f3c8bd9507a520321c9324"
    );
    assert_eq!(
        hash("http", "post", "https://api.example.com/upload?x=1", &http),
        "511efefa5aa78ae92a5e511994f94008343fcc53e01c60591606ac4ea0801366"
    );
}

#[test]
fn a_token_permits_its_call_once() {
    let case = Case::new(json!({ "target": "x" }));
    let (token, mut nonces) = (case.token(), Nonces::in_memory());
    case.redeem(&token, &mut nonces, at(10)).unwrap();
    assert_eq!(case.redeem(&token, &mut nonces, at(11)), Err(Invalid::Used));
}

#[test]
fn a_token_has_its_time() {
    let case = Case::new(json!({}));
    let token = case.token();
    let redeem = |token: &Token, now| case.redeem(token, &mut Nonces::in_memory(), now);
    let expired = Err(Invalid::Expired(token.expires_at.clone()));
    assert_eq!(redeem(&token, at(300)), expired);
    redeem(&token, at(299)).unwrap();
    assert_eq!(redeem(&token, at(-61)), Err(Invalid::Time("issued_at")));
    let signed = |issued: &str, expires: &str| {
        let mut token = token.clone();
        (token.issued_at, token.expires_at) = (issued.into(), expires.into());
        token.signature = secrets().sign(&token.signed());
        redeem(&token, at(0))
    };
    let (issued, expires) = (timestamp(at(0)), timestamp(at(9)));
    signed(&issued, &expires).unwrap();
    assert_eq!(
        signed(&issued, "2099-01-01T00:00:00"),
        Err(Invalid::Time("expires_at"))
    );
    assert_eq!(
        signed(&issued, "2099-01-01T00:00:00+00:00"),
        Err(Invalid::Time("expires_at"))
    );
    assert_eq!(signed("soon", &expires), Err(Invalid::Time("issued_at")));
}

#[test]
fn each_field_of_a_token_counts() {
    let case = Case::new(json!({ "a": 1 }));
    let token = json!(case.token());
    for field in token.as_object().unwrap().keys() {
        let mut changed = token.clone();
        changed[field] = match &token[field] {
            Value::String(text) if text.ends_with('0') => json!(format!("{}1", &text[1..])),
            Value::String(text) => json!(format!("{}0", &text[1..])),
            other => panic!("{field} is {other}"),
        };
        let changed: Token = serde_json::from_value(changed).unwrap();
        let refused = case.redeem(&changed, &mut Nonces::in_memory(), at(1));
        assert_eq!(refused, Err(Invalid::Signature), "{field}");
    }
}

#[test]
fn a_token_without_all_arguments_is_refused() {
    let case = Case::new(json!({ "a": 1 }));
    let mut token = case.token();
    token.arguments_hash = None;
    token.signature = secrets().sign(&token.signed());
    let refused = case.redeem(&token, &mut Nonces::in_memory(), at(1));
    assert_eq!(refused, Err(Invalid::Field("arguments_hash")));
}

#[test]
fn times_have_the_form_of_python() {
    assert_eq!(timestamp(at(0)), "2030-03-17T17:46:40+00:00");
    let micros = at(0) + time::Duration::microseconds(1234);
    assert_eq!(timestamp(micros), "2030-03-17T17:46:40.001234+00:00");
}

/// A value with some structure.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-zä\"\\\\ ]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-c]{1,2}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn a_token_is_for_its_arguments_alone(decided in value(), executed in value()) {
        let case = Case::new(decided.clone());
        let token = case.token();
        let other = Case { arguments: executed.clone(), graph: case.graph.clone(), node: case.node.clone() };
        let redeemed = other.redeem(&token, &mut Nonces::in_memory(), at(1));
        prop_assert_eq!(redeemed.is_ok(), decided == executed);
    }
}
