//! Checks what a job asks for against what the operator allows: the restrictions of Nomad's
//! Docker driver, and one for images.

use wildmatch::WildMatch;

use super::{
    Error, Plugin, Task,
    plugin::{DEFAULT_CAPS, cap_name},
    value::refused,
};

/// A container's capabilities as changes to Docker's default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Capabilities {
    pub add: Vec<String>,
    pub drop: Vec<String>,
}

impl Task {
    /// Checks every option that the plugin's options restrict.
    ///
    /// # Errors
    /// [`Error::Value`] with the first option that is not allowed.
    pub fn check_allowed(&self, plugin: &Plugin) -> Result<(), Error> {
        self.not_allowed(plugin)
            .into_iter()
            .next()
            .map_or(Ok(()), Err)
    }

    /// Every option that the plugin's options do not allow.
    pub(crate) fn not_allowed(&self, plugin: &Plugin) -> Vec<Error> {
        let allow = &plugin.allow;
        let mut errors: Vec<_> = check_image("image", &self.image, plugin)
            .err()
            .into_iter()
            .collect();
        if self.privileged && !allow.privileged {
            errors.push(refused(
                "privileged",
                true,
                "must be `false`, unless the plugin sets `allow_privileged`",
            ));
        }
        if let Some(runtime) = &self.runtime
            && !allow.runtimes.contains(runtime)
        {
            let allowed = format!(
                "the plugin's `allow_runtimes` allows {}",
                allow.runtimes.join(", ")
            );
            errors.push(refused("runtime", runtime, allowed));
        }
        for (field, given, globs) in [
            ("pid_mode", &self.pid_mode, &allow.modes.pid),
            ("ipc_mode", &self.ipc_mode, &allow.modes.ipc),
            ("uts_mode", &self.uts_mode, &allow.modes.uts),
            ("userns_mode", &self.userns_mode, &allow.modes.userns),
        ] {
            if let Some(mode) = given
                && !allow.privileged
                && !is_private(mode)
                && !matches(globs, mode)
            {
                let list = field.trim_end_matches("_mode");
                let allowed = format!("must be listed in the plugin's `allowed_modes.{list}`");
                errors.push(refused(field, mode, allowed));
            }
        }
        if self.cgroupns.as_deref() == Some("host") && !allow.privileged {
            errors.push(refused(
                "cgroupns",
                "host",
                "must be `private`, unless the plugin sets `allow_privileged`",
            ));
        }
        if self.oom_score_adj < 0 && !allow.privileged {
            let allowed = "must be 0 to 1000, unless the plugin sets `allow_privileged`";
            errors.push(refused("oom_score_adj", self.oom_score_adj, allowed));
        }
        if let Some(limit) = self.pids_limit
            && limit > plugin.pids_limit
        {
            let allowed = format!(
                "must be at most the plugin's `pids_limit`, {}",
                plugin.pids_limit
            );
            errors.push(refused("pids_limit", limit, allowed));
        }
        errors.extend(self.capabilities(plugin).err());
        errors
    }

    /// The capabilities to add and drop. Those that the plugin does not allow are dropped,
    /// even if Docker grants them by default.
    ///
    /// # Errors
    /// [`Error::Value`] with the capabilities that are not allowed.
    pub fn capabilities(&self, plugin: &Plugin) -> Result<Capabilities, Error> {
        let allowed = &plugin.allow.caps;
        let everything = allowed.iter().any(|cap| cap == "all");
        let add: Vec<String> = self.cap_add.iter().map(|cap| cap_name(cap)).collect();
        let drop: Vec<String> = self.cap_drop.iter().map(|cap| cap_name(cap)).collect();
        let refused_caps: Vec<_> = (add.iter().map(String::as_str))
            .filter(|cap| !everything && !allowed.iter().any(|allowed| allowed == cap))
            .collect();
        if !refused_caps.is_empty() {
            let allowed = format!("the plugin's `allow_caps` allows {}", allowed.join(", "));
            return Err(refused("cap_add", refused_caps.join(", "), allowed));
        }
        if drop.iter().any(|cap| cap == "all") {
            return Ok(Capabilities {
                add,
                drop: vec!["all".into()],
            });
        }
        // Docker's default is `DEFAULT_CAPS` plus NET_RAW.
        let withheld = DEFAULT_CAPS
            .into_iter()
            .chain(["net_raw"])
            .filter(|cap| !everything && !allowed.iter().any(|allowed| allowed == cap));
        let mut all: Vec<String> = withheld.map(str::to_owned).chain(drop).collect();
        all.sort();
        all.dedup();
        all.retain(|cap| !add.contains(cap));
        Ok(Capabilities { add, drop: all })
    }
}

/// Whether the operator lets jobs use an image.
pub(super) fn check_image(field: &str, image: &str, plugin: &Plugin) -> Result<(), Error> {
    let images = &plugin.allow.images;
    if images.is_empty() || matches(images, image) {
        return Ok(());
    }
    let allowed = format!("the plugin's `allow_images` allows {}", images.join(", "));
    Err(refused(field, image, allowed))
}

/// Modes that share nothing with the host or another container.
fn is_private(mode: &str) -> bool {
    matches!(mode, "private" | "none" | "shareable")
}

fn matches(globs: &[String], text: &str) -> bool {
    globs.iter().any(|glob| WildMatch::new(glob).matches(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, tests::task};

    fn plugin(options: serde_json::Value) -> Plugin {
        Plugin::parse(&rmp_serde::to_vec_named(&options).unwrap()).unwrap()
    }

    fn plain(mut options: serde_json::Value) -> Task {
        options["image"] = "busybox:1".into();
        match task(&options).unwrap() {
            Config::Plain(task) => *task,
            Config::Slot(_) => panic!("not a slot"),
        }
    }

    #[track_caller]
    fn denied(options: serde_json::Value, allow: serde_json::Value, field: &str) {
        let error = plain(options)
            .check_allowed(&plugin(allow))
            .unwrap_err()
            .to_string();
        assert!(error.contains(&format!("`{field}`")), "{error}");
    }

    #[track_caller]
    fn allowed(options: serde_json::Value, allow: serde_json::Value) {
        plain(options).check_allowed(&plugin(allow)).unwrap();
    }

    /// C067: which capabilities a job may add, and which of Docker's default remain.
    #[test]
    fn capabilities_are_those_the_plugin_allows() {
        use serde_json::json;
        let caps = |add: &[&str], drop: &[&str], allow: serde_json::Value| {
            plain(json!({"cap_add": add, "cap_drop": drop}))
                .capabilities(&plugin(allow))
                .map(|caps| (caps.add.join(" "), caps.drop.join(" ")))
        };
        let own = |add: &str, drop: &str| (add.to_owned(), drop.to_owned());
        assert_eq!(caps(&[], &[], json!({})).unwrap(), own("", "net_raw"));
        assert_eq!(
            caps(&["CAP_FOWNER"], &[], json!({})).unwrap(),
            own("fowner", "net_raw")
        );
        let refused = caps(&["net_admin"], &[], json!({}))
            .unwrap_err()
            .to_string();
        assert!(refused.contains("net_admin"), "{refused}");
        assert_eq!(
            caps(&[], &["chown", "net_raw"], json!({})).unwrap(),
            own("", "chown net_raw")
        );
        assert_eq!(
            caps(&["chown"], &["all"], json!({})).unwrap(),
            own("chown", "all")
        );
        let one = json!({"allow_caps": ["chown"]});
        let (_, dropped) = caps(&[], &[], one.clone()).unwrap();
        assert_eq!(dropped.split(' ').count(), 13);
        assert!(!dropped.contains("chown"));
        assert!(caps(&["kill"], &["all"], one).is_err());
        let all = json!({"allow_caps": ["all"]});
        assert_eq!(
            caps(&["net_admin"], &[], all.clone()).unwrap(),
            own("net_admin", "")
        );
        assert_eq!(caps(&["all"], &[], all).unwrap(), own("all", ""));
    }

    /// C064, C065: sharing the host's namespaces needs permission.
    #[test]
    fn namespaces_of_others_are_shared_only_if_the_plugin_allows_it() {
        use serde_json::json;
        for mode in ["pid", "ipc", "uts", "userns"] {
            let field = format!("{mode}_mode");
            denied(json!({&field: "host"}), json!({}), &field);
            denied(
                json!({&field: "container:x"}),
                json!({"allowed_modes": {mode: ["host"]}}),
                &field,
            );
            allowed(json!({&field: "host"}), json!({"allow_privileged": true}));
            allowed(
                json!({&field: "host"}),
                json!({"allowed_modes": {mode: ["host"]}}),
            );
            allowed(
                json!({&field: "container:x"}),
                json!({"allowed_modes": {mode: ["container*"]}}),
            );
        }
        allowed(json!({"ipc_mode": "private"}), json!({}));
        denied(json!({"cgroupns": "host"}), json!({}), "cgroupns");
    }

    #[test]
    fn loosening_options_are_refused_by_name() {
        use serde_json::json;
        denied(json!({"privileged": true}), json!({}), "privileged");
        denied(json!({"runtime": "runsc"}), json!({}), "runtime");
        allowed(
            json!({"runtime": "runsc"}),
            json!({"allow_runtimes": ["runsc"]}),
        );
        denied(json!({"oom_score_adj": -1}), json!({}), "oom_score_adj");
        denied(json!({"pids_limit": 5000}), json!({}), "pids_limit");
        denied(
            json!({}),
            json!({"allow_images": ["registry.example/*"]}),
            "image",
        );
        allowed(json!({}), json!({"allow_images": ["busybox:*"]}));
    }
}
