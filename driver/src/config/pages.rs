//! Tests that hold pages of the documentation against the schemas.

use super::{
    from_docker::{Fate, PLUGIN, TASK, Table},
    schema,
};

/// Every option of a schema with its type, blocks before what is in them.
fn table(spec: polydev_proto::hclspec::Spec) -> Vec<(String, String)> {
    use polydev_proto::hclspec::{Spec, spec::Block};
    fn walk(prefix: &str, spec: Spec, rows: &mut Vec<(String, String)>) {
        let Some(Block::Object(object)) = spec.block else {
            panic!("an object")
        };
        for (name, child) in object.attributes {
            let name = format!("{prefix}{name}");
            let below = format!("{name}.");
            match child.block.unwrap() {
                Block::Attr(attr) => rows.push((name, attr.r#type)),
                Block::BlockAttrs(_) => rows.push((name, "block of strings".into())),
                Block::BlockValue(block) => {
                    rows.push((name, "block".into()));
                    walk(&below, *block.nested.unwrap(), rows);
                }
                Block::BlockList(list) => {
                    rows.push((name, "blocks".into()));
                    walk(&below, *list.nested.unwrap(), rows);
                }
                other => panic!("a kind of spec that the page has no word for: {other:?}"),
            }
        }
    }
    let mut rows = Vec::new();
    walk("", spec, &mut rows);
    rows
}

/// The options of a schema, with those in blocks.
pub(super) fn names(spec: polydev_proto::hclspec::Spec) -> Vec<String> {
    table(spec).into_iter().map(|(name, _)| name).collect()
}

/// The tables of `docs/options.md` under a heading: option and type.
fn documented(heading: &str) -> Vec<(String, String)> {
    let page = include_str!("../../../docs/options.md");
    let (_, section) = page.split_once(&format!("\n## {heading}\n")).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let cell = |cell: &str| cell.trim().trim_matches('`').to_owned();
    let mut rows: Vec<_> = section
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .map(|line| {
            let mut cells = line.split('|');
            (cell(cells.next().unwrap()), cell(cells.next().unwrap()))
        })
        .collect();
    rows.sort();
    rows
}

#[test]
fn the_page_of_options_and_the_schemas_are_equal() {
    for (heading, spec) in [("Plugin", schema::plugin()), ("Task", schema::task())] {
        let mut schema = table(spec);
        let others = match heading {
            "Plugin" => PLUGIN.others,
            _ => TASK.others,
        };
        // The page of those who come from Nomad's Docker driver has them.
        schema.retain(|(name, _)| {
            let row = others.iter().find(|row| row.option == name);
            !row.is_some_and(|row| matches!(row.fate, Fate::Refused(_)))
                && name != "mounts"
                && !name.starts_with("mounts.")
        });
        schema.sort();
        assert_eq!(documented(heading), schema, "docs/options.md, {heading}");
    }
}

/// The tables of the page, as they must be.
fn page(table: &Table) -> String {
    let same: Vec<String> = table.same.iter().map(|name| format!("`{name}`")).collect();
    let mut text = format!("The same: {}.\n\n", same.join(", "));
    text += "| option | here | |\n|---|---|---|\n";
    for row in table.others {
        let here = match row.fate {
            Fate::Alias(_) => "taken",
            Fate::Differs(_) => "differs",
            Fate::Refused(_) => "refused",
        };
        text += &format!("| `{}` | {here} | {} |\n", row.option, row.fate.text());
    }
    text
}

#[test]
fn the_page_for_those_who_come_from_the_docker_driver_has_the_tables() {
    let document = include_str!("../../../docs/from-docker-driver.md");
    for table in [TASK, PLUGIN] {
        let expected = page(&table);
        assert!(
            document.contains(&expected),
            "docs/from-docker-driver.md must have:\n{expected}"
        );
    }
}
