//! Empty Ethernet frames, which set a queue in motion.

use std::{
    io, mem,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, sendto, socket,
};

/// Reaches the nearest bridge and no further (IEEE 802.1D).
const TO: [u8; 6] = [0x01, 0x80, 0xc2, 0, 0, 0x0e];
/// Reserved for experiments (IEEE 802): nobody listens to it.
const KIND: [u8; 2] = [0x88, 0xb5];
/// The minimum length of an Ethernet frame without its checksum.
const LENGTH: usize = 60;

/// A socket for frames in one network namespace. It has no protocol, so it receives
/// nothing.
///
/// The kernel closes such a socket only when no processor can still use it, which takes up
/// to tens of milliseconds. So it is closed where nobody waits for that.
#[derive(Debug)]
pub(super) struct Frames(Option<OwnedFd>);

impl Drop for Frames {
    fn drop(&mut self) {
        let socket = self.0.take();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(|| drop(socket));
        }
    }
}

impl Frames {
    /// Opens a socket in this thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
        Ok(Self(Some(socket)))
    }

    /// Sends an empty frame out of an interface. An interface that is down or has a full
    /// queue does not need one.
    pub(super) fn send_empty(&self, interface: u32) -> io::Result<()> {
        match &self.0 {
            Some(socket) => send_empty(socket, interface),
            None => Ok(()),
        }
    }
}

fn send_empty(socket: &OwnedFd, interface: u32) -> io::Result<()> {
    let mut frame = [0; LENGTH];
    frame[..6].copy_from_slice(&TO);
    frame[12..14].copy_from_slice(&KIND);
    let mut sll_addr = [0; 8];
    sll_addr[..6].copy_from_slice(&TO);
    let address = nix::libc::sockaddr_ll {
        sll_family: AddressFamily::Packet as u16,
        sll_protocol: 0,
        sll_ifindex: interface.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr,
    };
    let size = u32::try_from(mem::size_of_val(&address)).expect("it is some bytes");
    // SAFETY: the pointer is to a whole address of this size and family, which outlives the call.
    #[expect(
        unsafe_code,
        reason = "nix can only make such addresses from those of the kernel"
    )]
    let address = unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(size)) };
    let address = address.ok_or(io::ErrorKind::InvalidInput)?;
    match sendto(socket.as_raw_fd(), &frame, &address, MsgFlags::empty()) {
        Ok(_)
        | Err(
            nix::errno::Errno::ENETDOWN | nix::errno::Errno::ENOBUFS | nix::errno::Errno::EAGAIN,
        ) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
