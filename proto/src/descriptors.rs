//! Bytes and file descriptors over a unix stream socket.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most descriptors of one call.
const MAX: usize = 8;

/// Sends bytes with descriptors attached to the first one. Returns how many bytes were sent. It
/// does not wait.
///
/// # Errors
/// As `sendmsg`; `WouldBlock` if the socket has no room.
pub fn send(stream: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if descriptors.len() > MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if !descriptors.is_empty() {
        let _there_is_room = ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, flags);
    Ok(sent?)
}

/// Receives bytes into `piece`, and the descriptors that come with them. Returns how many bytes
/// came, 0 at the end. It does not wait.
///
/// # Errors
/// As `recvmsg`; `WouldBlock` if nothing is there, and an error if a descriptor was lost for
/// want of room: then nobody knows which one belongs to which message.
pub fn receive(
    stream: impl AsFd,
    piece: &mut [u8],
    descriptors: &mut impl Extend<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream, &mut [IoSliceMut::new(piece)], &mut ancillary, flags)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("a descriptor was lost"));
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Read, os::unix::net::UnixStream};

    #[test]
    fn a_descriptor_comes_with_the_first_byte_and_is_the_one_that_was_sent() {
        let (one, other) = UnixStream::pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let mut reader = reader;
        assert_eq!(send(&one, b"with", &[writer.as_fd()]).unwrap(), 4);
        drop(writer);
        assert_eq!(send(&one, b"without", &[]).unwrap(), 7);
        let (mut piece, mut descriptors) = ([0; 64], Vec::new());
        assert_eq!(receive(&other, &mut piece, &mut descriptors).unwrap(), 4);
        assert_eq!(descriptors.len(), 1);
        drop(descriptors);
        let end = reader.read(&mut [0]).unwrap();
        assert_eq!(end, 0, "the last writer is gone");
        let mut none: Vec<OwnedFd> = Vec::new();
        assert_eq!(receive(&other, &mut piece, &mut none).unwrap(), 7);
        assert!(none.is_empty());
        let nothing = receive(&other, &mut piece, &mut none).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        drop(one);
        assert_eq!(receive(&other, &mut piece, &mut none).unwrap(), 0);
    }

    #[test]
    fn more_descriptors_than_fit_are_refused() {
        let (one, _other) = UnixStream::pair().unwrap();
        let many = [one.as_fd(); MAX + 1];
        let refused = send(&one, b"x", &many).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
}
