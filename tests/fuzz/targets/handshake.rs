//! The environment in which a host starts the plugin.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polydev_driver::plugin::handshake;

fuzz_target!(|data: &[u8]| {
    // `NAME=value` lines, as `env` prints them; what is not UTF-8 is not set.
    let text = String::from_utf8_lossy(data);
    let variable = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once('='));
        lines
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.to_owned())
    };
    let answer = handshake::check(variable);
    if variable("NOMAD_PLUGIN_MAGIC_COOKIE").is_none() {
        assert_eq!(answer, Err(handshake::Error::ByHand));
    }
});
