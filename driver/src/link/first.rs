//! The first message of a connection, and the descriptor that comes with its first byte.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::OwnedFd,
};

use bytes::BytesMut;
use polydev_proto::frame;
use prost::Message;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use tokio::{io::Interest, net::UnixStream};

/// Why there is no first message.
#[derive(Debug)]
pub(crate) enum Unread {
    Broken(io::Error),
    Protocol(frame::Error),
    Closed,
}

/// Reads a message. What comes after it stays in `input`.
///
/// # Errors
/// [`Unread`]
///
/// # Cancel safety
/// A descriptor that has come is lost.
pub(crate) async fn first<M: Message + Default>(
    stream: &UnixStream,
    input: &mut BytesMut,
) -> Result<(M, Option<OwnedFd>), Unread> {
    let mut descriptor = None;
    loop {
        if let Some(message) = frame::decode(input).map_err(Unread::Protocol)? {
            return Ok((message, descriptor));
        }
        let received = stream.async_io(Interest::READABLE, || {
            let mut piece = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut pieces = [IoSliceMut::new(&mut piece)];
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received = recvmsg(stream, &mut pieces, &mut ancillary, flags)?;
            if received.flags.contains(ReturnFlags::CTRUNC) {
                return Err(io::Error::other("a descriptor was lost"));
            }
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                    descriptor = descriptors.next().or(descriptor.take());
                }
            }
            input.extend_from_slice(&piece[..received.bytes]);
            Ok(received.bytes)
        });
        if received.await.map_err(Unread::Broken)? == 0 {
            return Err(Unread::Closed);
        }
    }
}
