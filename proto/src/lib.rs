//! The wire contracts: our own (`runtime`, `node`, `init`), and those of Nomad's driver
//! plugins and of go-plugin, restated from their published names and numbers.
//!
//! This crate makes no decisions; the crate polydev-transport makes connections. Without
//! the feature `grpc` it contains only [`agent`], [`init`], [`error`], [`exec`], [`frame`],
//! [`outside`], [`prompt`], [`provider`], [`stream`], [`workspace`] and `sealed`, because
//! polydev-init must stay small.

#![cfg_attr(
    feature = "grpc",
    expect(
        clippy::doc_lazy_continuation,
        reason = "prost indents the lines of a list by one space less than Markdown wants"
    )
)]
#![cfg_attr(
    feature = "grpc",
    expect(
        clippy::allow_attributes_without_reason,
        reason = "tonic's generated code has some"
    )
)]

/// The shim's service for callers, `polydev.runtime.v1`.
#[cfg(feature = "grpc")]
pub mod runtime {
    tonic::include_proto!("polydev.runtime.v1");
}

/// The driver's service for shims, `polydev.node.v1`.
#[cfg(feature = "grpc")]
pub mod node {
    tonic::include_proto!("polydev.node.v1");
}

/// The protocol between the driver and process 1 of a container, `polydev.init.v1`.
pub mod init {
    include!(concat!(env!("OUT_DIR"), "/polydev.init.v1.rs"));

    /// The protocol version of this build.
    pub const PROTOCOL_VERSION: u32 = 1;

    /// Most bytes of [`Secrets`] before they are sealed: more than any credential needs,
    /// but small compared with a message's limit.
    pub const MAX_SECRETS: usize = 256 << 10;

    /// Size of [`MAX_SECRETS`] bytes when sealed: plus an encapsulated key of 32 bytes and
    /// a tag of 16.
    pub const MAX_SEALED: usize = MAX_SECRETS + 48;

    /// Most bytes of a refreshed account file that a run may report.
    pub const MAX_REFRESHED: usize = 64 << 10;

    /// Most bytes of the label that is sent with it.
    pub const MAX_LABEL: usize = 1024;
}

/// The protocol between the driver and the broker of its node, `polydev.broker.v1`.
#[cfg(feature = "broker")]
pub mod broker {
    include!(concat!(env!("OUT_DIR"), "/polydev.broker.v1.rs"));

    /// The protocol version of this build.
    pub const PROTOCOL_VERSION: u32 = 5;

    /// Most bytes of [`Keys`] before they are sealed: three keys of any provider.
    pub const MAX_KEYS: usize = 16 << 10;

    /// Size of [`MAX_KEYS`] bytes when sealed: plus an encapsulated key of 32 bytes and a tag
    /// of 16.
    pub const MAX_SEALED: usize = MAX_KEYS + 48;

    pub use crate::outside::PORT;
}

pub mod agent;
#[cfg(feature = "broker")]
pub mod budget;
#[cfg(feature = "descriptors")]
pub mod descriptors;
#[cfg(feature = "broker")]
pub mod egress;
pub mod error;
pub mod exec;
#[cfg(feature = "execution")]
pub mod execution;
pub mod frame;
#[cfg(feature = "grpc")]
pub mod id;
pub mod outside;
pub mod prompt;
pub mod provider;
#[cfg(feature = "sealed")]
pub mod sealed;
#[cfg(feature = "execution")]
pub mod signing;
pub mod stream;
#[cfg(feature = "broker")]
pub mod upstream;
pub mod workspace;

/// Nomad's plugin protocols. Module paths mirror the packages, because generated code
/// refers to other packages by relative path.
#[cfg(feature = "grpc")]
pub mod hashicorp {
    pub mod nomad {
        pub mod plugins {
            pub mod base {
                pub mod proto {
                    tonic::include_proto!("hashicorp.nomad.plugins.base.proto");
                }
            }
            pub mod drivers {
                pub mod proto {
                    tonic::include_proto!("hashicorp.nomad.plugins.drivers.proto");
                }
            }
            pub mod shared {
                pub mod hclspec {
                    tonic::include_proto!("hashicorp.nomad.plugins.shared.hclspec");
                }
                pub mod structs {
                    tonic::include_proto!("hashicorp.nomad.plugins.shared.structs");
                }
            }
        }
    }
}

#[cfg(feature = "grpc")]
pub use hashicorp::nomad::plugins::{
    base::proto as base, drivers::proto as driver, shared::hclspec, shared::structs,
};

/// go-plugin's own services.
#[cfg(feature = "grpc")]
pub mod goplugin {
    tonic::include_proto!("plugin");
}

/// All files above as an encoded `FileDescriptorSet`, for server reflection.
#[cfg(feature = "grpc")]
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
