//! What Nomad sends as a task's or the plugin's `config`: msgpack of an operator's text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polydev_driver::config::{Config, Plugin};

fuzz_target!(|data: &[u8]| {
    let plugin = Plugin::parse(data);
    let task = Config::parse(data);
    for error in [plugin.as_ref().err(), task.as_ref().err()]
        .into_iter()
        .flatten()
    {
        let text = error.to_string();
        assert!(text.contains('`'), "no field is named: {text}");
    }
    if let Ok(task) = task {
        let defaults = || Plugin::parse(&[]).expect("the defaults are allowed");
        let _gated = task.check_allowed(&plugin.unwrap_or_else(|_| defaults()));
    }
});
