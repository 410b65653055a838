//! The rules of a prompt, for who passes it on and for the agent that reads more of them.

use crate::{exec::MAX_STRING, init::Tools, outside::File, provider::Vendor, workspace};

/// Largest number of bytes in a prompt: with the rest of a run it fits into one message.
pub const MAX_TEXT: usize = 3 << 20;

/// Largest number of bytes in the system text of a prompt: it is one argument for some CLIs.
pub const MAX_SYSTEM: usize = 64 << 10;

/// A prompt that the CLI would not accept.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct Invalid {
    pub field: &'static str,
    pub problem: &'static str,
}

/// Checks what holds for all CLIs. An empty model is the CLI's choice.
///
/// # Errors
/// [`Invalid`]
pub fn check(text: &str, model: &str) -> Result<(), Invalid> {
    let problems = [
        ("prompt.text", text.is_empty(), "is empty"),
        ("prompt.text", text.len() > MAX_TEXT, "is longer than 3 MiB"),
        ("prompt.text", text.contains('\0'), "has a NUL byte"),
        ("prompt.model", model.starts_with('-'), "begins with `-`"),
    ];
    match problems.into_iter().find(|(_, is_so, _)| *is_so) {
        Some((field, _, problem)) => Err(Invalid { field, problem }),
        None => Ok(()),
    }
}

/// A prompt's text, changed so that the provider's CLI does not take it for a command of its own.
#[must_use]
pub fn as_text(provider: Vendor, text: String) -> String {
    match provider {
        // Claude Code 2.1.332 does what `/clear` says, in each of its forms, but not what
        // ` /clear` says.
        Vendor::Anthropic if text.starts_with('/') => format!(" {text}"),
        _ => text,
    }
}

/// Whether a CLI that waits would take the text for a command of its own.
#[must_use]
pub fn is_command_to_agent(provider: Vendor, text: &str) -> bool {
    // Gemini CLI 0.61 does what `/memory show` and `$memory show` say, but only with `--acp`.
    provider == Vendor::Google && text.trim_start().starts_with(['/', '$'])
}

/// What a CLI must be told when it starts, so that a prompt has its system text and its tools.
/// Tried out with Claude Code 2.1.332, Codex 0.171 and Gemini CLI 0.61: a test reads which tools
/// their models are offered.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    pub args: Vec<String>,
    pub files: Vec<File>,
}

impl Options {
    /// Empty without a system text and with all tools.
    ///
    /// # Errors
    /// [`Invalid`]
    pub fn of(provider: Vendor, system: &str, tools: Tools) -> Result<Self, Invalid> {
        let invalid = |field, problem| Err(Invalid { field, problem });
        if system.len() > MAX_SYSTEM {
            return invalid("prompt.system", "is longer than 65536 bytes");
        }
        if system.contains('\0') {
            return invalid("prompt.system", "has a NUL byte");
        }
        let mut options = Self::default();
        let mut args = Vec::new();
        match (provider, tools) {
            (_, Tools::Unspecified | Tools::All) => {}
            // Servers of MCP have tools, too.
            (Vendor::Anthropic, Tools::None) => args.extend(["--tools=", "--strict-mcp-config"]),
            (Vendor::Anthropic, Tools::Read) => {
                args.extend(["--tools=Read,Glob,Grep", "--strict-mcp-config"]);
            }
            (Vendor::OpenAi, Tools::None | Tools::Read) => {
                return invalid(
                    "prompt.tools",
                    "is not `all`: Codex has no option that takes all other tools away",
                );
            }
            (Vendor::Google, Tools::None | Tools::Read) => {
                let allowed = match tools {
                    Tools::Read => ALLOW_READING,
                    _ => "",
                };
                options.files.push(File {
                    path: GEMINI_POLICY,
                    content: format!("{allowed}{DENY_ALL}"),
                });
            }
        }
        options.args = args.into_iter().map(str::to_owned).collect();
        match provider {
            _ if system.is_empty() => {}
            Vendor::Anthropic => {
                let system = format!("--append-system-prompt={system}");
                options.args.push(system);
            }
            Vendor::OpenAi => {
                let system = format!("developer_instructions={}", toml_string(system));
                if system.len() > MAX_STRING {
                    let problem =
                        "is longer than 131071 bytes once Codex's argument has its escapes";
                    return invalid("prompt.system", problem);
                }
                options.args.extend(["-c".to_owned(), system]);
            }
            // It has no option that adds to its text, but a file of its user.
            Vendor::Google => options.files.push(File {
                path: ".gemini/GEMINI.md",
                content: system.to_owned(),
            }),
        }
        Ok(options)
    }

    /// The same for a CLI that asks before each call of a tool. What it would not ask about is off.
    #[must_use]
    pub fn asking(mut self, provider: Vendor, tools: Tools) -> Self {
        match provider {
            Vendor::Anthropic => {
                let args = ["--settings", CLAUDE_SETTINGS, "--strict-mcp-config"];
                self.args.extend(args.map(str::to_owned));
            }
            Vendor::OpenAi => {
                // With full access, Codex would trust the folder: its rules, and its servers of MCP.
                let folder = workspace::PATH;
                let trust = format!("projects={{\"{folder}\"={{trust_level=\"untrusted\"}}}}");
                let settings = [trust].into_iter();
                let settings = settings.chain(CODEX_SETTINGS.map(str::to_owned));
                (self.args).extend(settings.flat_map(|setting| ["-c".to_owned(), setting]));
            }
            Vendor::Google => {
                let content = match tools {
                    Tools::Unspecified | Tools::All => format!("{ASK_ALL}{DENY_AGENTS}"),
                    Tools::Read => format!("{ASK_READING}{DENY_ALL}"),
                    Tools::None => DENY_ALL.to_owned(),
                };
                self.files.retain(|file| file.path != GEMINI_POLICY);
                self.files.push(File {
                    path: GEMINI_POLICY,
                    content,
                });
            }
        }
        self
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.args.is_empty() && self.files.is_empty()
    }
}

/// No file has a say beside our hook: neither its hooks, nor the lines that skills would run, nor a
/// program for keys, nor a variable that leaves hooks out. Tried out with Claude Code 2.1.332.
const CLAUDE_SETTINGS: &str = "{\"disableAllHooks\":true,\"disableSkillShellExecution\":true,\
    \"apiKeyHelper\":\"\",\"env\":{\"CLAUDE_CODE_SIMPLE\":\"\"}}";
/// Codex 0.171 does not ask about searches, about images, or about what is typed into a command that
/// was allowed. With goals, it begins turns that nobody has asked for.
const CODEX_SETTINGS: [&str; 4] = [
    "web_search=\"disabled\"",
    "features.view_image=false",
    "features.unified_exec_tty=false",
    "features.goals=false",
];
/// Gemini CLI reads each file of this folder.
const GEMINI_POLICY: &str = ".gemini/policies/polydev-tools.toml";
const DENY_ALL: &str = "[[rule]]\ntoolName = \"*\"\ndecision = \"deny\"\npriority = 998\n";
const ALLOW_READING: &str = "[[rule]]\n\
    toolName = [\"read_file\", \"list_directory\", \"glob\", \"grep_search\"]\n\
    decision = \"allow\"\npriority = 999\n";
const ASK_READING: &str = "[[rule]]\n\
    toolName = [\"read_file\", \"list_directory\", \"glob\", \"grep_search\"]\n\
    decision = \"ask_user\"\npriority = 999\n";
const ASK_ALL: &str = "[[rule]]\ntoolName = \"*\"\ndecision = \"ask_user\"\npriority = 998\n";
/// The tools of agents that its model starts are not known to ask.
const DENY_AGENTS: &str =
    "[[rule]]\ntoolName = \"invoke_agent\"\ndecision = \"deny\"\npriority = 999\n";

/// A text in the quotes and escapes of TOML.
pub(crate) fn toml_string(text: &str) -> String {
    let mut quoted = String::from('"');
    for char in text.chars() {
        match char {
            '"' | '\\' => quoted.extend(['\\', char]),
            char if char.is_control() => quoted.push_str(&format!("\\u{:04x}", char as u32)),
            char => quoted.push(char),
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_cli_would_take_is_refused_by_its_field() {
        let refused = |text: &str, model| check(text, model).unwrap_err().to_string();
        assert_eq!(refused("", ""), "`prompt.text` is empty");
        assert_eq!(refused("a\0", ""), "`prompt.text` has a NUL byte");
        assert_eq!(refused("hi", "--yolo"), "`prompt.model` begins with `-`");
        let longest = "x".repeat(MAX_TEXT);
        assert_eq!(check(&longest, "m"), Ok(()));
        assert_eq!(
            refused(&(longest + "x"), ""),
            "`prompt.text` is longer than 3 MiB"
        );
    }

    #[test]
    fn options_are_what_each_cli_reads_at_its_start() {
        let of = |provider, system, tools| Options::of(provider, system, tools).unwrap();
        for provider in Vendor::all() {
            assert!(of(provider, "", Tools::All).is_empty());
        }
        let claude = of(Vendor::Anthropic, "-x", Tools::None);
        assert_eq!(
            claude.args,
            [
                "--tools=",
                "--strict-mcp-config",
                "--append-system-prompt=-x"
            ]
        );
        let codex = of(Vendor::OpenAi, "a \"b\"\n\u{7f}", Tools::All);
        let text = "developer_instructions=\"a \\\"b\\\"\\u000a\\u007f\"";
        assert_eq!(codex.args, ["-c", text]);
        let gemini = of(Vendor::Google, "a", Tools::Read);
        let paths: Vec<_> = gemini.files.iter().map(|file| file.path).collect();
        assert_eq!(paths, [GEMINI_POLICY, ".gemini/GEMINI.md"]);
        let asking = |provider, tools| of(provider, "", tools).asking(provider, tools);
        let trust = "projects={\"/workspace\"={trust_level=\"untrusted\"}}";
        assert_eq!(asking(Vendor::OpenAi, Tools::All).args[..2], ["-c", trust]);
        let settings = &asking(Vendor::Anthropic, Tools::All).args[1];
        assert!(
            settings.starts_with('{') && settings.ends_with("}}"),
            "{settings}"
        );
        for (tools, allows) in [
            (Tools::All, false),
            (Tools::Read, false),
            (Tools::None, false),
        ] {
            let [file] = &asking(Vendor::Google, tools).files[..] else {
                panic!("one file");
            };
            assert_eq!(file.content.contains("\"allow\""), allows, "{tools:?}");
        }
        let refused = |provider, system: &str, tools| {
            let refused = Options::of(provider, system, tools).unwrap_err();
            refused.field
        };
        assert_eq!(refused(Vendor::OpenAi, "", Tools::Read), "prompt.tools");
        let escaped = "\n".repeat(MAX_SYSTEM);
        assert_eq!(
            refused(Vendor::OpenAi, &escaped, Tools::All),
            "prompt.system"
        );
        let long = "x".repeat(MAX_SYSTEM + 1);
        assert_eq!(refused(Vendor::Google, &long, Tools::All), "prompt.system");
        assert_eq!(refused(Vendor::Google, "\0", Tools::All), "prompt.system");
    }
}
