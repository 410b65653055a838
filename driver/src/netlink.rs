//! Requests to the kernel's routing tables, in any network namespace.

use std::{fs::File, io, net::IpAddr, thread};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
pub(crate) use netlink_packet_route::AddressFamily;
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{
        InfoBridgePort, InfoKind, InfoPortData, InfoPortKind, LinkAttribute, LinkFlags, LinkInfo,
        LinkMessage,
    },
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sched::{CloneFlags, setns};

/// A socket in the network namespace of a process; see [`in_network`].
pub(crate) fn connect_in(pid: u32) -> io::Result<Socket> {
    in_network(pid, connect)
}

/// Runs `make` in the network namespace of a process. A socket that it creates stays in
/// that namespace. Blocks for about a millisecond.
pub(crate) fn in_network<T: Send + 'static>(
    pid: u32,
    make: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    // In a thread of its own, which ends in the other namespace.
    let inside = thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        make()
    });
    inside.join().map_err(|_| io::Error::other("thread died"))?
}

/// The address of a family at which the host reaches a namespace, if it has one.
pub(crate) fn address(socket: &Socket, family: AddressFamily) -> io::Result<Option<IpAddr>> {
    let mut found = None;
    let mut message = AddressMessage::default();
    message.header.family = family;
    let dump = RouteNetlinkMessage::GetAddress(message);
    request(socket, dump, NLM_F_DUMP, |message| {
        if let RouteNetlinkMessage::NewAddress(address) = message
            && address.header.scope == AddressScope::Universe
        {
            let all = || address.attributes.iter();
            let local = all().find_map(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            // That of the peer, where there is a local one. IPv6 has this one alone.
            let other = all().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            found = found.or(local).or(other);
        }
    })?;
    Ok(found)
}

/// The first interface whose peer is in another namespace, and the index of the peer.
pub(crate) fn find_veth(socket: &Socket) -> io::Result<Option<(u32, u32)>> {
    let mut found = None;
    let dump = RouteNetlinkMessage::GetLink(LinkMessage::default());
    request(socket, dump, NLM_F_DUMP, |message| {
        if let RouteNetlinkMessage::NewLink(link) = message {
            // Other kinds, such as macvlan, refer to an interface of the host instead of a peer.
            let is_veth = link.attributes.iter().any(|attribute| match attribute {
                LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Veth)),
                _ => false,
            });
            let peer = link
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::Link(peer) if is_veth && *peer != 0 => Some(*peer),
                    _ => None,
                });
            found = found.or(peer.map(|peer| (link.header.index, peer)));
        }
    })?;
    Ok(found)
}

/// `ip link set dev INTERFACE type bridge_slave isolated on`: what comes in by this port of a bridge
/// leaves by no other isolated one.
pub(crate) fn isolate(socket: &Socket, index: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::Isolated(
            true,
        )])),
    ]));
    request(
        socket,
        RouteNetlinkMessage::NewLink(message),
        NLM_F_ACK,
        |_| {},
    )
}

/// `ip link set dev INTERFACE up`, or `down`. Nothing if there is no such interface.
pub(crate) fn set_up(interface: &str, up: bool) -> io::Result<()> {
    let index = match nix::net::if_::if_nametoindex(interface) {
        Err(nix::Error::ENODEV) => return Ok(()),
        index => index?,
    };
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.change_mask = LinkFlags::Up;
    if up {
        message.header.flags = LinkFlags::Up;
    }
    request(
        &connect()?,
        RouteNetlinkMessage::SetLink(message),
        NLM_F_ACK,
        |_| {},
    )
}

pub(crate) fn connect() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Sends one request and reads until its acknowledgement or the end of its dump. The kernel
/// responds before `send` returns, so this never blocks.
pub(crate) fn request(
    socket: &Socket,
    payload: RouteNetlinkMessage,
    flags: u16,
    mut each: impl FnMut(RouteNetlinkMessage),
) -> io::Result<()> {
    let mut request = NetlinkMessage::from(payload);
    request.header.flags = NLM_F_REQUEST | flags;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;

    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(io::Error::other)?;
            let length = (message.header.length as usize).next_multiple_of(4).max(16);
            rest = rest.get(length..).unwrap_or_default();
            match message.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::InnerMessage(inner) => each(inner),
                _ => {}
            }
        }
    }
}
