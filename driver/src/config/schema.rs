//! The schemas in hclspec, Nomad's own language for them. Nomad refuses what is
//! not in them, by name, before the driver sees it.

use std::collections::BTreeMap;

use polydev_proto::hclspec::{Attr, Block, Object, Spec, spec};

/// Options of `plugin "nomad-driver-polydev" { config { ... } }`.
#[must_use]
pub fn plugin() -> Spec {
    object([
        attribute("endpoint", "string", Required::No),
        attribute("state_dir", "string", Required::No),
        attribute("init_path", "string", Required::No),
        block(
            "run_class",
            [
                attribute("cpu", "number", Required::No),
                attribute("memory", "number", Required::No),
                attribute("mbits", "number", Required::No),
                attribute("pids", "number", Required::No),
            ],
        ),
    ])
}

/// Options of `task { config { ... } }`.
#[must_use]
pub fn task() -> Spec {
    object([
        // Of a plain task, which is refused with the reason.
        attribute("image", "string", Required::No),
        block(
            "slot",
            [
                attribute("provider", "string", Required::Yes),
                attribute("image", "string", Required::No),
            ],
        ),
    ])
}

enum Required {
    Yes,
    No,
}

type Named = (&'static str, Spec);

fn object<const N: usize>(children: [Named; N]) -> Spec {
    let attributes: BTreeMap<String, Spec> = children
        .into_iter()
        .map(|(name, spec)| (name.to_owned(), spec))
        .collect();
    Spec {
        block: Some(spec::Block::Object(Object { attributes })),
    }
}

fn attribute(name: &'static str, kind: &str, required: Required) -> Named {
    let attr = Attr {
        name: name.into(),
        r#type: kind.into(),
        required: matches!(required, Required::Yes),
    };
    (
        name,
        Spec {
            block: Some(spec::Block::Attr(attr)),
        },
    )
}

fn block<const N: usize>(name: &'static str, children: [Named; N]) -> Named {
    let nested = Some(Box::new(object(children)));
    let block = Block {
        name: name.into(),
        required: false,
        nested,
    };
    (
        name,
        Spec {
            block: Some(spec::Block::BlockValue(Box::new(block))),
        },
    )
}
