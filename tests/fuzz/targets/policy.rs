//! An operator's rules: whatever is read decides, and what always holds still holds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polydev_policy::{
    decision::Outcome,
    lattice::Label,
    rules::{Rules, ToolFacts},
    sink::Risk,
};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(rules) = Rules::read(text) else {
        return;
    };
    let facts = ToolFacts {
        caller: "cn:a".into(),
        tool: "bash".into(),
        action: "exec".into(),
        target: "x".into(),
        risk: Risk::Critical,
        blocks_untrusted: true,
        blocks_egress: true,
        label: Label::EXTERNAL,
        tags: Vec::new(),
        agent: None,
    };
    assert_eq!(rules.tool(&facts).outcome, Outcome::Block);
});
