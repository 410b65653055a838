//! Generates Rust from the `.proto` files with protox, which needs no `protoc`.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const INIT: &[&str] = &["polydev/init/v1/init.proto"];
const BROKER: &[&str] = &["polydev/broker/v1/broker.proto"];
const GRPC: &[&str] = &[
    "polydev/runtime/v1/runtime.proto",
    "polydev/node/v1/node.proto",
    "nomad/base.proto",
    "nomad/driver.proto",
    "nomad/goplugin.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=polydev");
    println!("cargo:rerun-if-changed=nomad");

    let grpc = env::var_os("CARGO_FEATURE_GRPC").is_some();
    let files = INIT.iter().chain(if grpc { GRPC } else { &[] });
    let descriptors = protox::compile(files, ["."])?;

    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;

    let configure = || {
        tonic_prost_build::configure()
            .bytes(".polydev")
            .btree_map(".")
            .boxed(".polydev.runtime.v1.RunRequest.message.start")
            .boxed(".polydev.node.v1.ClaimRequest.message.claim")
            .boxed(".polydev.init.v1.ToInit.message.start")
            .boxed(".polydev.broker.v1.FromBroker.message.held")
            .boxed(".polydev.broker.v1.ToBroker.message.open")
            .boxed(".polydev.broker.v1.ToBroker.message.grant")
    };
    configure().compile_fds(protox::compile(INIT, ["."])?)?;
    if env::var_os("CARGO_FEATURE_BROKER").is_some() {
        let mut broker = configure();
        if grpc {
            // They are in the driver's journal too.
            for counted in ["ModelUsage", "ApiError", "Destination"] {
                broker = broker.type_attribute(
                    format!(".polydev.broker.v1.{counted}"),
                    "#[derive(serde::Serialize, serde::Deserialize)] #[serde(default)]",
                );
            }
        }
        broker.compile_fds(protox::compile(BROKER, ["."])?)?;
    }
    if grpc {
        // The node's protocol uses these messages, whose Rust modules differ from their
        // packages.
        configure()
            .extern_path(".polydev.init.v1", "crate::init")
            .extern_path(".polydev.broker.v1", "crate::broker")
            .compile_fds(descriptors)?;
    }
    Ok(())
}
