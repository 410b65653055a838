//! The wire contracts: ours (`runtime`, `node`, `init`) and, restated from their
//! published names and numbers, those of Nomad's driver plugins and of go-plugin.
//!
//! Nothing here decides anything. The crate polydev-transport connects. Without the feature `grpc`
//! only [`init`], [`error`], [`exec`], [`frame`], [`provider`], [`workspace`] and `sealed` remain,
//! which is all that polydev-init may carry.

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

/// Between the driver and process 1 of a container, `polydev.init.v1`.
pub mod init {
    include!(concat!(env!("OUT_DIR"), "/polydev.init.v1.rs"));

    /// The protocol version that both sides of this build speak.
    pub const PROTOCOL_VERSION: u32 = 1;

    /// Most bytes of [`Secrets`] before they are sealed: more than any credential has, and
    /// little beside a message's limit.
    pub const MAX_SECRETS: usize = 256 << 10;

    /// Most bytes of [`MAX_SECRETS`] when sealed: with an encapsulated key of 32 and a tag of
    /// 16 bytes.
    pub const MAX_SEALED: usize = MAX_SECRETS + 48;

    /// Most bytes of a file that is told back when a run has refreshed it.
    pub const MAX_REFRESHED: usize = 64 << 10;

    /// Most bytes of the label that comes with it.
    pub const MAX_LABEL: usize = 1024;
}

pub mod error;
pub mod exec;
pub mod frame;
pub mod provider;
#[cfg(feature = "grpc")]
pub mod run_id;
#[cfg(feature = "sealed")]
pub mod sealed;
pub mod stream;
pub mod workspace;

/// Nomad's plugin protocols. Module paths mirror the packages, because generated
/// code refers to other packages by relative path.
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
