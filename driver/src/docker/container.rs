//! A slot's container, as Docker's API describes it.

use std::{collections::HashMap, path::PathBuf};

use bollard::models::{
    ContainerCreateBody, HostConfig, HostConfigLogConfig, Mount, MountType, RestartPolicy,
    RestartPolicyNameEnum,
};

use polydev_proto::{broker::PORT, workspace};

use super::signed;
use crate::limits::{CPU_PERIOD, Limits};

/// The paths of the driver's files inside a container.
pub(super) const INIT: &str = "/.polydev/init";
pub(super) const LINK: &str = "/.polydev/link";
pub(super) const SOCKET: &str = "/.polydev/link/init.sock";
/// The home of a slot's user, whatever the image says: it alone can be written to.
const HOME: &str = "/home/runtime";

/// A hardened container with polydev-init as process 1.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    pub name: String,
    pub image: String,
    pub labels: HashMap<String, String>,
    /// The init program on the host.
    pub init: PathBuf,
    /// The host folder of the socket that init connects to.
    pub link: PathBuf,
    pub resolv_conf: PathBuf,
    /// The Docker network. `None` for loopback alone: what the container reaches, it reaches
    /// through the broker.
    pub network: Option<String>,
    pub limits: Limits,
    /// Numeric owner of the home folder.
    pub uid: u32,
    pub gid: u32,
}

impl ContainerSpec {
    pub(super) fn body(&self) -> ContainerCreateBody {
        let Self {
            limits, uid, gid, ..
        } = self;
        let mut env = vec![format!("HOME={HOME}")];
        if self.network.is_none() {
            env.extend(proxy_variables());
        }
        ContainerCreateBody {
            image: Some(self.image.clone()),
            entrypoint: Some(vec![INIT.into(), SOCKET.into(), PORT.to_string()]),
            cmd: Some(vec![]),
            user: Some(format!("{uid}:{gid}")),
            env: Some(env),
            labels: Some(self.labels.clone()),
            host_config: Some(HostConfig {
                cap_drop: Some(vec!["ALL".into()]),
                security_opt: Some(vec!["no-new-privileges=true".into()]),
                readonly_rootfs: Some(true),
                network_mode: Some(self.network.clone().unwrap_or_else(|| "none".into())),
                ipc_mode: Some("private".into()),
                init: Some(false),
                memory: signed(limits.memory_bytes()),
                memory_swap: signed(limits.memory_bytes()),
                cpu_period: signed(CPU_PERIOD.as_micros()),
                cpu_quota: signed(limits.cpu_quota().as_micros()),
                pids_limit: Some(limits.pids.into()),
                mounts: Some(vec![
                    bind(&self.init, INIT),
                    bind(&self.link, LINK),
                    bind(&self.resolv_conf, "/etc/resolv.conf"),
                ]),
                tmpfs: Some(HashMap::from([
                    tmpfs("/tmp", "noexec,mode=1777,size=128m"),
                    tmpfs(
                        "/run",
                        &format!("noexec,mode=0755,size=16m,uid={uid},gid={gid}"),
                    ),
                    // What a CLI installs for itself and starts is below the home: npm's cache
                    // with MCP servers, `.local/bin`, scripts.
                    tmpfs(
                        HOME,
                        &format!("exec,mode=0700,size=128m,uid={uid},gid={gid}"),
                    ),
                    // A caller's files may be programs, so execution is allowed.
                    tmpfs(
                        workspace::PATH,
                        &format!(
                            "exec,mode=0700,size={},uid={uid},gid={gid}",
                            workspace::MAX_BYTES
                        ),
                    ),
                ])),
                // Contains only init's own messages: the command's output does not pass
                // through dockerd.
                log_config: Some(HostConfigLogConfig {
                    typ: Some("json-file".into()),
                    config: Some(HashMap::from([
                        ("max-size".into(), "64k".into()),
                        ("max-file".into(), "1".into()),
                    ])),
                }),
                restart_policy: Some(RestartPolicy {
                    name: Some(RestartPolicyNameEnum::NO),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

/// Programs read them in either case; curl reads `http_proxy` in lower case alone.
pub(super) fn proxy_variables() -> Vec<String> {
    let proxy = format!("http://127.0.0.1:{PORT}");
    let direct = "127.0.0.1,localhost,::1";
    let variables = [
        ("HTTP_PROXY", &*proxy),
        ("HTTPS_PROXY", &proxy),
        ("NO_PROXY", direct),
    ];
    let both = |(name, value): (&str, &str)| {
        [
            format!("{name}={value}"),
            format!("{}={value}", name.to_lowercase()),
        ]
    };
    variables.into_iter().flat_map(both).collect()
}

/// A read-only mount of a host folder or file. The `-v` syntax cannot be used, because it
/// cannot escape a colon.
pub(super) fn bind(source: &std::path::Path, target: &str) -> Mount {
    Mount {
        typ: Some(MountType::BIND),
        source: Some(source.to_string_lossy().into_owned()),
        target: Some(target.into()),
        read_only: Some(true),
        ..Default::default()
    }
}

fn tmpfs(path: &str, options: &str) -> (String, String) {
    (path.into(), format!("rw,nosuid,nodev,{options}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> ContainerSpec {
        ContainerSpec {
            name: "polydev-1".into(),
            image: "polydev-openai-runtime:latest".into(),
            labels: HashMap::new(),
            init: "/state/init".into(),
            link: "/state/link:1".into(),
            resolv_conf: "/state/resolv.conf".into(),
            network: Some("polydev-1".into()),
            limits: Limits::IDLE,
            uid: 1000,
            gid: 1000,
        }
    }

    #[test]
    fn a_slots_container_is_hardened() {
        let body = spec().body();
        assert_eq!(body.env, Some(vec!["HOME=/home/runtime".into()]));
        let host = body.host_config.unwrap();
        assert_eq!(host.cap_drop, Some(vec!["ALL".into()]));
        assert_eq!(
            host.security_opt,
            Some(vec!["no-new-privileges=true".into()])
        );
        assert_eq!(host.readonly_rootfs, Some(true));
        assert!(!host.privileged.unwrap_or(false));
        assert_eq!(host.memory, Some(256 << 20));
        assert_eq!(host.memory_swap, host.memory, "no swap");
        assert_eq!(host.cpu_quota, Some(10_000));
        assert_eq!(host.pids_limit, Some(64));
        assert_eq!(host.network_mode.as_deref(), Some("polydev-1"));
        assert!(host.binds.is_none() && host.cap_add.is_none() && host.devices.is_none());
        assert!(
            host.mounts
                .unwrap()
                .iter()
                .all(|mount| mount.read_only == Some(true))
        );
    }

    #[test]
    fn without_a_network_the_broker_is_the_proxy() {
        let spec = ContainerSpec {
            network: None,
            ..spec()
        };
        let body = spec.body();
        assert_eq!(
            body.host_config.unwrap().network_mode.as_deref(),
            Some("none")
        );
        let env = body.env.unwrap();
        assert!(
            env.contains(&"https_proxy=http://127.0.0.1:8319".to_owned()),
            "{env:?}"
        );
        assert!(
            env.contains(&"NO_PROXY=127.0.0.1,localhost,::1".to_owned()),
            "{env:?}"
        );
    }
}
