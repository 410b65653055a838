//! A model's answer, and a registry of tools: what is read has arguments that are hashed in one form
//! alone, and what is executed is what the registry says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polydev_policy::canonical;
use polydev_tool_gate::{payload, registry::Registry};

const TOOLS: &str = r#"
    [[tool]]
    name = "report"
    argv = ["/usr/bin/head", "-n", "{lines}", "--", "{path}"]
    target = "path"
    allow = ["*"]
    risk = "low"
    capability = "filesystem_read"

    [[tool]]
    name = "bash"
    action = "exec"
    argv = ["{command:words}"]
    target = "command"
    allow = ["*"]
"#;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let _registry = Registry::read(text);
    let Ok(calls) = payload::calls(text) else {
        return;
    };
    let registry = Registry::read(TOOLS).expect("it is a registry");
    for call in calls {
        assert!(call.arguments.is_object());
        let canonical = canonical::text(&call.arguments);
        assert!(canonical.is_ascii());
        let again: serde_json::Value = serde_json::from_str(&canonical).expect("it is JSON");
        assert_eq!(call.arguments, again);
        if let Ok(resolved) = registry.resolve(call.name.as_deref(), &call.arguments) {
            let is_known = resolved.tool == "bash" || resolved.argv[0] == "/usr/bin/head";
            assert!(is_known && !resolved.argv.iter().any(|part| part.contains('\0')));
        }
    }
});
