//! Empty Ethernet frames, to set a queue in motion.

use std::{
    io, mem,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, sendto, socket,
};

/// The nearest bridge and no further (IEEE 802.1D).
const TO: [u8; 6] = [0x01, 0x80, 0xc2, 0, 0, 0x0e];
/// Set aside for experiments (IEEE 802): nobody listens to it.
const KIND: [u8; 2] = [0x88, 0xb5];
/// The shortest that Ethernet has, without its checksum.
const LENGTH: usize = 60;

/// A socket for frames in one network namespace; without a protocol it receives none.
///
/// The kernel closes one only when no processor can be using it any more, which takes up
/// to tens of milliseconds: so it is closed where that holds up nobody.
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
    /// In this thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
        Ok(Self(Some(socket)))
    }

    /// Sends an empty frame out of an interface. One that is down, or whose queue is full,
    /// needs none.
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
    // SAFETY: it points to a whole address of this size and family, which lives until then.
    #[expect(
        unsafe_code,
        reason = "nix makes such addresses from the kernel's own only"
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
