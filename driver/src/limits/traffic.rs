//! Token buckets on both ends of a container's veth pair. The host's end limits what the
//! container receives, the container's end what it sends. A container cannot change them,
//! unless its job may use `net_admin` or `privileged`.

use std::io;

use netlink_packet_core::{DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};
use netlink_sys::Socket;

use super::{Error, Rates, frames::Frames};
use crate::netlink;

/// Most traffic that may queue behind the bucket, as time at the limited rate.
const QUEUE_MILLIS: u32 = 100;

/// The two ends of one container's veth pair.
#[derive(Debug)]
pub(super) struct Shaper {
    host: End,
    container: End,
}

/// One interface, with sockets in its network namespace.
#[derive(Debug)]
struct End {
    socket: Socket,
    frames: Frames,
    interface: u32,
}

impl Shaper {
    /// Finds both ends of the container whose first process is `pid`.
    pub(super) fn open(pid: u32) -> Result<Self, Error> {
        let enter = |source| Error::EnterNetwork { pid, source };
        let inside = || Ok((netlink::connect()?, Frames::open()?));
        let (socket, own_frames) = netlink::in_network(pid, inside).map_err(enter)?;
        let (interface, peer) = netlink::find_veth(&socket)
            .map_err(enter)?
            .ok_or(Error::NoInterface { pid })?;
        let host = End {
            socket: netlink::connect().map_err(enter)?,
            frames: Frames::open().map_err(enter)?,
            interface: peer,
        };
        let container = End {
            socket,
            frames: own_frames,
            interface,
        };
        Ok(Self { host, container })
    }

    /// Isolates the bridge's port of the container.
    pub(super) fn isolate(&self) -> Result<(), Error> {
        let End {
            socket, interface, ..
        } = &self.host;
        netlink::isolate(socket, *interface).map_err(Error::Isolate)
    }

    /// Limits each direction that has a rate.
    pub(super) fn shape(&self, rates: &Rates) -> Result<(), Error> {
        let shape = |end: &End, rate: Option<u32>, direction| match rate {
            Some(mbits) => end
                .replace_bucket(mbits, rates.burst)
                .map_err(|source| Error::Shape { direction, source }),
            None => Ok(()),
        };
        shape(&self.host, rates.ingress_mbits, "incoming")?;
        shape(&self.container, rates.egress_mbits, "outgoing")
    }
}

impl End {
    /// `tc qdisc replace dev INTERFACE root handle 1: tbf rate MBITSmbit ...`
    fn replace_bucket(&self, mbits: u32, burst: u32) -> io::Result<()> {
        let mut message = TcMessage::with_index(self.interface.cast_signed());
        message.header.parent = TcHandle::ROOT;
        message.header.handle = TcHandle { major: 1, minor: 0 };
        message.attributes.push(TcAttribute::Kind("tbf".into()));
        message
            .attributes
            .push(TcAttribute::Options(token_bucket(mbits, burst)));
        let flags = NLM_F_CREATE | NLM_F_REPLACE | NLM_F_ACK;
        netlink::request(
            &self.socket,
            RouteNetlinkMessage::NewQueueDiscipline(message),
            flags,
            |_| {},
        )?;
        // Waiting packets would wait as long as the old rate says, unless another packet
        // follows.
        self.frames.send_empty(self.interface)
    }
}

/// Options of the `tbf` queueing discipline (`linux/pkt_sched.h`): the parameters, and the
/// burst in bytes, which avoids converting to the kernel's clock ticks.
fn token_bucket(mbits: u32, burst: u32) -> Vec<TcOption> {
    const TCA_TBF_PARMS: u16 = 1;
    const TCA_TBF_BURST: u16 = 6;
    const LINKLAYER_ETHERNET: u8 = 1;

    let bytes_per_second = mbits.saturating_mul(125_000);
    let queue = (bytes_per_second / 1000).saturating_mul(QUEUE_MILLIS);

    // struct tc_tbf_qopt: rate, peakrate (none), limit, buffer, mtu.
    let mut options = [0; 36];
    options[1] = LINKLAYER_ETHERNET;
    options[8..12].copy_from_slice(&bytes_per_second.to_ne_bytes());
    options[24..28].copy_from_slice(&queue.saturating_add(burst).to_ne_bytes());
    vec![
        TcOption::Other(DefaultNla::new(TCA_TBF_PARMS, options.to_vec())),
        TcOption::Other(DefaultNla::new(TCA_TBF_BURST, burst.to_ne_bytes().to_vec())),
    ]
}
