//! Encodes the node's images.

use polydev_proto::node::{Image, ListImagesResponse, PruneImagesResponse};
use prost_types::Timestamp;
use tonic::Status;

use crate::{
    chain,
    images::{Error, Ours, Pruned},
};

pub(super) fn list(images: Result<Vec<Ours>, Error>) -> Result<ListImagesResponse, Status> {
    let images = images.map_err(|error| unavailable(&error))?;
    Ok(ListImagesResponse {
        images: images.into_iter().map(encode).collect(),
    })
}

pub(super) fn pruned(pruned: Result<Pruned, Error>) -> Result<PruneImagesResponse, Status> {
    let Pruned { images, reclaimed } = pruned.map_err(|error| unavailable(&error))?;
    Ok(PruneImagesResponse {
        images: images.into_iter().map(encode).collect(),
        reclaimed_bytes: reclaimed,
    })
}

fn unavailable(error: &Error) -> Status {
    Status::unavailable(chain(error))
}

fn encode(ours: Ours) -> Image {
    let Ours {
        image,
        in_use,
        fetched,
    } = ours;
    Image {
        image_id: image.id,
        tags: image.tags,
        size_bytes: image.size,
        unique_bytes: image.unique,
        created: Some(Timestamp {
            seconds: image.created,
            nanos: 0,
        }),
        in_use,
        fetched,
    }
}
