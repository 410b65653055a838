//! Token buckets on both ends of a container's veth pair: the host's end limits
//! what the container receives, its own end what it sends. The container has no
//! capability to change either.

use std::{fs::File, io, thread};

use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sched::{CloneFlags, setns};

use super::Error;

/// A burst of this much passes at full speed; a segmented packet of the host is 64 KiB.
const BURST_BYTES: u32 = 64 << 10;
/// How much may queue behind the bucket, in time at the limited rate.
const QUEUE_MILLIS: u32 = 100;

/// The two ends of one container's veth pair.
#[derive(Debug)]
pub(super) struct Shaper {
    host: End,
    container: End,
}

/// One interface and a netlink socket in its network namespace, where the socket
/// stays for good, whatever namespace uses it later.
#[derive(Debug)]
struct End {
    socket: Socket,
    interface: u32,
}

impl Shaper {
    /// Finds both ends of the container whose first process is `pid`.
    pub(super) fn open(pid: u32) -> Result<Self, Error> {
        let enter = |source| Error::EnterNetwork { pid, source };
        let namespace = File::open(format!("/proc/{pid}/ns/net")).map_err(enter)?;
        // A thread of its own, which ends in the other namespace.
        let inside = thread::spawn(move || -> io::Result<Socket> {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            connect()
        });
        let socket = inside
            .join()
            .map_err(|_| enter(io::Error::other("thread died")))?;
        let socket = socket.map_err(enter)?;

        let (interface, peer) = find_veth(&socket)
            .map_err(enter)?
            .ok_or(Error::NoInterface { pid })?;
        let host = End {
            socket: connect().map_err(enter)?,
            interface: peer,
        };
        Ok(Self {
            host,
            container: End { socket, interface },
        })
    }

    /// Limits each direction to `mbits` megabits a second.
    pub(super) fn shape(&self, mbits: u32) -> Result<(), Error> {
        let shape = |end: &End, direction| {
            end.replace_bucket(mbits)
                .map_err(|source| Error::Shape { direction, source })
        };
        shape(&self.host, "incoming")?;
        shape(&self.container, "outgoing")
    }
}

impl End {
    /// `tc qdisc replace dev INTERFACE root handle 1: tbf rate MBITSmbit ...`
    fn replace_bucket(&self, mbits: u32) -> io::Result<()> {
        let mut message = TcMessage::with_index(self.interface.cast_signed());
        message.header.parent = TcHandle::ROOT;
        message.header.handle = TcHandle { major: 1, minor: 0 };
        message.attributes.push(TcAttribute::Kind("tbf".into()));
        message
            .attributes
            .push(TcAttribute::Options(token_bucket(mbits)));
        let flags = NLM_F_CREATE | NLM_F_REPLACE | NLM_F_ACK;
        request(
            &self.socket,
            RouteNetlinkMessage::NewQueueDiscipline(message),
            flags,
            |_| {},
        )
    }
}

/// Options of the `tbf` queueing discipline (`linux/pkt_sched.h`): the parameters,
/// and the burst in bytes, which spares us the kernel's clock ticks.
fn token_bucket(mbits: u32) -> Vec<TcOption> {
    const TCA_TBF_PARMS: u16 = 1;
    const TCA_TBF_BURST: u16 = 6;
    const LINKLAYER_ETHERNET: u8 = 1;

    let bytes_per_second = mbits.saturating_mul(125_000);
    let queue = (bytes_per_second / 1000).saturating_mul(QUEUE_MILLIS);

    // struct tc_tbf_qopt: rate, peakrate (none), limit, buffer, mtu.
    let mut options = [0; 36];
    options[1] = LINKLAYER_ETHERNET;
    options[8..12].copy_from_slice(&bytes_per_second.to_ne_bytes());
    options[24..28].copy_from_slice(&queue.saturating_add(BURST_BYTES).to_ne_bytes());
    vec![
        TcOption::Other(DefaultNla::new(TCA_TBF_PARMS, options.to_vec())),
        TcOption::Other(DefaultNla::new(
            TCA_TBF_BURST,
            BURST_BYTES.to_ne_bytes().to_vec(),
        )),
    ]
}

/// The first interface that has its other end elsewhere, and the index of that end.
fn find_veth(socket: &Socket) -> io::Result<Option<(u32, u32)>> {
    let mut found = None;
    let dump = RouteNetlinkMessage::GetLink(LinkMessage::default());
    request(socket, dump, NLM_F_DUMP, |message| {
        if let RouteNetlinkMessage::NewLink(link) = message {
            let peer = link
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::Link(peer) => Some(*peer),
                    _ => None,
                });
            found = found.or(peer.map(|peer| (link.header.index, peer)));
        }
    })?;
    Ok(found)
}

fn connect() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Sends one request and reads to its acknowledgement or the end of its dump. The
/// kernel answers before `send` returns, so that this never waits.
fn request(
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
