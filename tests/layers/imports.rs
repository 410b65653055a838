//! The imports between the files of a crate, from their `use` lines and paths.

use std::{
    collections::BTreeSet,
    fmt, fs,
    path::{Path, PathBuf},
};

use syn::{
    Attribute, Item, UseTree,
    visit::{self, Visit},
};

/// One module needs another.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Import {
    pub(crate) from: String,
    pub(crate) to: String,
}

impl Import {
    pub(crate) fn is_of_a_parent(&self) -> bool {
        let rest = self.from.strip_prefix(&self.to);
        rest.is_some_and(|rest| rest.starts_with("::"))
    }
}

impl fmt::Display for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} imports {}", self.from, self.to)
    }
}

/// The modules of a crate, one for each file, and their imports, without those of unit tests.
#[derive(Debug)]
pub(crate) struct Imports {
    pub(crate) modules: BTreeSet<String>,
    pub(crate) all: BTreeSet<Import>,
}

impl Imports {
    /// `source` is a crate's `src`, from the root of the repository.
    pub(crate) fn of(source: &str) -> Self {
        let source = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("..")
            .join(source);
        let files = files(&source);
        let modules: BTreeSet<String> = files.iter().map(|file| module(&source, file)).collect();
        let mut all = BTreeSet::new();
        for file in &files {
            let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{file:?}: {error}"));
            let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{file:?}: {error}"));
            let mut reader = Reader {
                from: module(&source, file),
                paths: Vec::new(),
            };
            reader.visit_file(&parsed);
            let Reader { from, paths } = reader;
            let targets = paths
                .iter()
                .filter_map(|path| target(path, &from, &modules));
            all.extend(targets.filter(|to| *to != from).map(|to| Import {
                from: from.clone(),
                to,
            }));
        }
        Self { modules, all }
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let paths = entries.map(|entry| entry.expect("a folder can be read").path());
    paths
        .flat_map(|path| match path.is_dir() {
            true => files(&path),
            false => vec![path],
        })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .filter(|path| path.file_name().is_some_and(|name| name != "tests.rs"))
        .collect()
}

/// `slot/keeper.rs` is `slot::keeper`; `lib.rs` is the root, which is empty.
fn module(source: &Path, file: &Path) -> String {
    let inside = file.strip_prefix(source).expect("a file of the crate");
    let names = inside.with_extension("");
    let names: Vec<_> = names.iter().map(|name| name.to_string_lossy()).collect();
    match names.join("::") {
        root if root == "lib" => String::new(),
        module => module,
    }
}

/// The module that a path leads to: the longest part of it that is one.
fn target(path: &[String], from: &str, modules: &BTreeSet<String>) -> Option<String> {
    let mut names: Vec<&str> = Vec::new();
    let mut rest = path.iter().map(String::as_str).peekable();
    match rest.next()? {
        "crate" => {}
        "self" => names.extend(from.split("::")),
        "super" => {
            names.extend(from.split("::"));
            names.pop();
            while rest.next_if_eq(&"super").is_some() {
                names.pop();
            }
        }
        // A child that is named without `self`.
        first => {
            names.extend(from.split("::").filter(|name| !name.is_empty()));
            names.push(first);
            if !modules.contains(&names.join("::")) {
                return None;
            }
        }
    }
    names.extend(rest);
    (1..=names.len())
        .rev()
        .map(|length| names[..length].join("::"))
        .find(|module| !module.is_empty() && modules.contains(module))
}

struct Reader {
    from: String,
    /// The paths as written, by segments.
    paths: Vec<Vec<String>>,
}

impl Reader {
    fn read(&mut self, tree: &UseTree, before: &[String]) {
        let with = |name: String| [before, &[name]].concat();
        match tree {
            UseTree::Path(path) => self.read(&path.tree, &with(path.ident.to_string())),
            UseTree::Name(name) => self.paths.push(with(name.ident.to_string())),
            UseTree::Rename(rename) => self.paths.push(with(rename.ident.to_string())),
            UseTree::Glob(_) => self.paths.push(before.to_vec()),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.read(tree, before)),
        }
    }
}

impl<'a> Visit<'a> for Reader {
    fn visit_item(&mut self, item: &'a Item) {
        let is_test = match item {
            Item::Mod(module) => module.attrs.iter().any(is_for_tests),
            Item::Fn(function) => function.attrs.iter().any(is_for_tests),
            _ => false,
        };
        if !is_test {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'a syn::ItemUse) {
        self.read(&item.tree, &[]);
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        let segments = path.segments.iter().map(|part| part.ident.to_string());
        let segments: Vec<_> = segments.collect();
        if matches!(segments[0].as_str(), "crate" | "super") {
            self.paths.push(segments);
        }
        visit::visit_path(self, path);
    }
}

fn is_for_tests(attribute: &Attribute) -> bool {
    let is_cfg = attribute.path().is_ident("cfg");
    is_cfg
        && attribute
            .parse_args::<syn::Ident>()
            .is_ok_and(|name| name == "test")
}
