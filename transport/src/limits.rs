//! Every number that a peer could drive up, in one table.

use std::num::NonZero;
use std::time::Duration;

const KIB: u32 = 1024;
const MIB: u32 = 1024 * KIB;

/// The limits of an endpoint. quinn's own defaults are far more generous (100 streams, an unlimited connection
/// window, 65,536 pending handshakes); none of them is left in place.
///
/// The worst case of an endpoint's memory is `connections_max × receive_window_bytes` of received and unread data
/// plus `upload_bytes_in_flight_max` of frames being assembled or worked on.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Socket buffer asked for in each direction, bytes. 4 MiB. With the usual 208 KiB, a thousand connections on one
    /// socket lose first flights (handshakes of a second and more) and close packets. The kernel may grant less: see
    /// `Endpoint::granted`.
    pub socket_buffer_bytes: usize,
    /// Open connections of a server endpoint. 10,000. Beyond: new ones are refused.
    pub connections_max: usize,

    /// Bidirectional streams that a peer may hold open. 4: one carries the session, the rest is for renewal and control.
    pub bidirectional_streams: u32,
    /// Unidirectional streams that a peer may hold open. 1.
    pub unidirectional_streams: u32,
    /// Unread bytes taken on one stream. 1 MiB. Lower: slow uploads over long distances. Higher: memory.
    pub stream_window_bytes: u32,
    /// Unread bytes taken on a server's connection before admission. 256 KiB.
    pub receive_window_bytes_before_admission: u32,
    /// Unread bytes taken on a connection after admission. 4 MiB.
    pub receive_window_bytes: u32,
    /// Bytes sent and not yet acknowledged, for a connection. 4 MiB.
    pub send_window_bytes: u64,

    /// A connection without a packet for this long is lost. 90 s on both sides.
    pub idle_timeout: Duration,
    /// An edge says something at least this often. 25 s: below the common 30 s of address translators. A server never
    /// does, so that a lost edge costs nothing.
    pub keep_alive: Duration,
    /// From the first packet to the open stream, at the server. 5 s.
    pub handshake_timeout: Duration,
    /// From the open stream to the first whole message, at the server. 5 s.
    pub hello_timeout: Duration,
    /// From the first packet to the Welcome, at the edge. 10 s.
    pub welcome_timeout: Duration,
    /// How long a closing side waits until its last message is acknowledged. 2 s.
    pub goodbye_timeout: Duration,

    /// Handshakes under way from which on unproven addresses must answer a Retry first. 100.
    pub handshakes_before_retry: usize,
    /// Handshakes under way at most; beyond, new ones are refused. 512 for each core: about a third of a second of work.
    pub handshakes_max: usize,
    /// Handshakes that one source address (one /64 for IPv6) may begin at once. 256: a site behind one translator.
    pub address_burst: u32,
    /// Handshakes that one source address may begin each second in the long run. 64.
    pub address_per_second: u32,
    /// Whether the budget of an address is counted for loopback addresses too. No: a laptop's demo and load test share one.
    pub address_budget_on_loopback: bool,

    /// Longest body of a frame that a server takes before admission. 16 KiB. Afterwards the caller says: `admit`.
    pub hello_bytes_max: u32,
    /// Longest body of a frame that an edge takes: a model. 64 MiB, 16 million values.
    pub model_frame_bytes_max: u32,
    /// Time for the rest of a frame once its first byte is there, and for writing one, besides a share for its length. 10 s.
    pub frame_timeout: Duration,
    /// Slowest rate of a long frame, bytes per second. 64 KiB. With `frame_timeout` it bounds how long a peer that
    /// trickles or stops half-way can hold memory.
    pub frame_bytes_per_second_min: u32,
    /// Bytes of large frames (over 64 KiB) being received or still in use, for the whole endpoint. 256 MiB. Beyond: the
    /// frame is read and dropped, and answered `busy`.
    pub upload_bytes_in_flight_max: u32,

    /// Longest body on the join listener. 16 KiB.
    pub join_bytes_max: u32,
    /// A whole enrolment, from the open stream to the answer's acknowledgement. 10 s.
    pub join_timeout: Duration,
    /// Enrolments at work at once. 256.
    pub joins_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        Self {
            socket_buffer_bytes: 4 << 20,
            connections_max: 10_000,
            bidirectional_streams: 4,
            unidirectional_streams: 1,
            stream_window_bytes: MIB,
            receive_window_bytes_before_admission: 256 * KIB,
            receive_window_bytes: 4 * MIB,
            send_window_bytes: 4 << 20,
            idle_timeout: Duration::from_secs(90),
            keep_alive: Duration::from_secs(25),
            handshake_timeout: Duration::from_secs(5),
            hello_timeout: Duration::from_secs(5),
            welcome_timeout: Duration::from_secs(10),
            goodbye_timeout: Duration::from_secs(2),
            handshakes_before_retry: 100,
            handshakes_max: 512 * cores,
            address_burst: 256,
            address_per_second: 64,
            address_budget_on_loopback: false,
            hello_bytes_max: 16 * KIB,
            model_frame_bytes_max: 64 * MIB,
            frame_timeout: Duration::from_secs(10),
            frame_bytes_per_second_min: 64 * KIB,
            upload_bytes_in_flight_max: 256 * MIB,
            join_bytes_max: 16 * KIB,
            join_timeout: Duration::from_secs(10),
            joins_max: 256,
        }
    }
}

impl Limits {
    /// Time that a frame of `length` bytes may take.
    pub fn frame_time(&self, length: usize) -> Duration {
        let rate = f64::from(self.frame_bytes_per_second_min.max(1));
        self.frame_timeout
            .saturating_add(Duration::from_secs_f64(length as f64 / rate))
    }

    /// The same endpoint as a join listener: one stream, no more than one request.
    pub(crate) fn for_join(&self) -> Self {
        let window = self.join_bytes_max.saturating_mul(2);
        Self {
            bidirectional_streams: 1,
            unidirectional_streams: 0,
            stream_window_bytes: window,
            receive_window_bytes_before_admission: window,
            receive_window_bytes: window,
            // Later than our own timeout, which closes with a reason.
            idle_timeout: self.join_timeout.saturating_mul(2),
            hello_bytes_max: self.join_bytes_max,
            frame_timeout: self.join_timeout,
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_frame_gets_time_by_its_length() {
        let limits = Limits::default();
        assert_eq!(limits.frame_time(0), Duration::from_secs(10));
        assert_eq!(limits.frame_time(64 * 1024 * 20), Duration::from_secs(30));
    }
}
