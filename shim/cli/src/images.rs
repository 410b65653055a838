//! `polydev-shim images`

use std::process::ExitCode;

use polydev_proto::runtime::{Image, ListImagesRequest, NodeImages, PruneImagesRequest};
use serde_json::{Value, json};

use super::{FAILED, Options, Output, print, told};

/// Images on the disks of nodes. Only images that are polydev's are listed and removed: those that a
/// driver has fetched, and those that were built with a label that begins with `dev.polydev.`.
#[derive(clap::Subcommand)]
pub enum Command {
    /// List the images of all nodes.
    List(Options),
    /// Show which images nothing uses, and remove them with --yes.
    Prune(Prune),
}

#[derive(clap::Args)]
pub struct Prune {
    /// Also images with tags. An image that was built on the node must then be built again before it
    /// is used. [default: only images whose tags other images have got]
    #[arg(long)]
    all: bool,
    /// Remove the images. Without this, the command only shows them.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    options: Options,
}

/// Exits with 1 if a node could not be asked. A node may take minutes, and the shim gives it five.
///
/// # Errors
/// If the shim cannot be reached, or refuses the call.
pub async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    let (nodes, output, done) = match command {
        Command::List(options) => {
            let mut shim = options.connect().await?;
            let images = shim.list_images(ListImagesRequest {}).await;
            (
                images.map_err(told)?.into_inner().nodes,
                options.output,
                None,
            )
        }
        Command::Prune(Prune { all, yes, options }) => {
            let mut shim = options.connect().await?;
            let request = PruneImagesRequest { all, remove: yes };
            let pruned = shim.prune_images(request).await;
            (
                pruned.map_err(told)?.into_inner().nodes,
                options.output,
                Some(yes),
            )
        }
    };
    print(&match output {
        Output::Text => text(&nodes, done),
        Output::Json => nodes
            .iter()
            .map(|node| format!("{}\n", to_json(node)))
            .collect(),
    })?;
    Ok(match nodes.iter().all(|node| node.reachable) {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(FAILED),
    })
}

/// `done` says whether images were removed; `None` if that was not asked for.
fn text(nodes: &[NodeImages], done: Option<bool>) -> String {
    let mut text = format!(
        "{:<36}  {:<12}  {:>10}  {:>10}  {:<3}  {:<7}  TAGS\n",
        "NODE", "IMAGE", "SIZE", "UNIQUE", "USE", "ORIGIN"
    );
    for node in nodes {
        if !node.reachable {
            text.push_str(&format!("{:<36}  {}\n", node.node_id, node.reason));
        }
        let lines = node.images.iter().map(|image| line(&node.node_id, image));
        text.extend(lines);
    }
    let Some(removed) = done else {
        return text;
    };
    let count: usize = nodes.iter().map(|node| node.images.len()).sum();
    let asked = nodes.iter().filter(|node| node.reachable);
    let reclaimed = asked.map(|node| node.reclaimed_bytes).sum::<Option<u64>>();
    let bytes = reclaimed.map_or("an unknown number of bytes".to_owned(), size);
    text.push_str(&match removed {
        true => format!("removed {count} images: {bytes}\n"),
        false if count == 0 => "nothing to remove\n".to_owned(),
        false => format!("would remove {count} images: {bytes}; --yes removes them\n"),
    });
    text
}

fn line(node_id: &str, image: &Image) -> String {
    let id = image.image_id.trim_start_matches("sha256:");
    format!(
        "{:<36}  {:<12}  {:>10}  {:>10}  {:<3}  {:<7}  {}\n",
        node_id,
        id.get(..12).unwrap_or(id),
        size(image.size_bytes),
        image.unique_bytes.map_or("-".to_owned(), size),
        if image.in_use { "yes" } else { "no" },
        if image.fetched { "fetched" } else { "built" },
        match image.tags.is_empty() {
            true => "-".to_owned(),
            false => image.tags.join(", "),
        },
    )
}

/// In the units of `docker images`.
fn size(bytes: u64) -> String {
    let units = [(1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => {
            let tenths = bytes / (unit / 10);
            format!("{}.{} {name}", tenths / 10, tenths % 10)
        }
        None => format!("{bytes} B"),
    }
}

fn to_json(node: &NodeImages) -> Value {
    let image = |image: &Image| {
        json!({
            "image_id": image.image_id, "tags": image.tags, "size_bytes": image.size_bytes,
            "unique_bytes": image.unique_bytes, "in_use": image.in_use,
            "fetched": image.fetched,
            "created": image.created.as_ref().map(ToString::to_string),
        })
    };
    json!({
        "node_id": node.node_id, "reachable": node.reachable, "reason": node.reason,
        "images": node.images.iter().map(image).collect::<Vec<_>>(),
        "reclaimed_bytes": node.reclaimed_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_units_of_docker() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_234_567, "1.2 MB"),
            (2_960_000_000, "2.9 GB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn a_dry_run_says_what_a_removal_would_free_if_all_nodes_know() {
        let image = Image {
            image_id: "sha256:0123456789abcdef".into(),
            size_bytes: 5_000_000,
            ..Image::default()
        };
        let node = |reclaimed_bytes| NodeImages {
            node_id: "n".into(),
            reachable: true,
            images: vec![image.clone()],
            reclaimed_bytes,
            ..NodeImages::default()
        };
        let known = text(&[node(Some(2_000_000)), node(Some(1_000_000))], Some(false));
        assert!(
            known.contains("would remove 2 images: 3.0 MB; --yes"),
            "{known}"
        );
        assert!(known.contains("0123456789ab ") && known.contains("5.0 MB"));
        let unknown = text(&[node(Some(2_000_000)), node(None)], Some(true));
        assert!(
            unknown.contains("removed 2 images: an unknown number"),
            "{unknown}"
        );
        assert_eq!(
            text(&[], Some(false)).lines().last(),
            Some("nothing to remove")
        );
    }
}
