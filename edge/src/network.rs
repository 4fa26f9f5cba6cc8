//! What the kernel tells of TCP on the way to one service: whether packets get lost, and whether the service reads what comes.
//!
//! The host's own counters (RFC 4022 names them `tcpOutSegs`, `tcpRetransSegs`; `/proc/net/snmp`) say how much is sent again, each
//! socket of `/proc/net/tcp` whether that concerns the service, and its queues whether it takes what arrives: a process that hangs has
//! something in them that it has not read, or a queue of connections that it has not taken.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use theriac_heal::incident::NetworkSeen;

use crate::sockets::SocketTable;

/// The ways to one port of this host, looked at again and again.
#[derive(Debug)]
pub(crate) struct Network {
    port: u16,
    before: Option<Counters>,
    /// Of the latest looks, oldest first: [`LOOKS`] of them, and all of the latest [`TOGETHER`].
    latest: VecDeque<Look>,
    /// Share that is sent again while it is well and nothing waits for word on the probe's own way.
    usual: f64,
    /// Looks that it was learnt from.
    learnt: u32,
}

/// Totals since the host started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Counters {
    sent: u64,
    resent: u64,
    dropped: u64,
}

#[derive(Debug, Clone, Copy)]
struct Look {
    at: Instant,
    /// Since the look before.
    grown: Counters,
    unheard: u32,
}

/// Sockets of the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Sockets {
    unheard: u32,
    unread: u32,
}

/// How old what is read of the table of sockets may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// As old as is right while all is well.
    Rarely,
    /// As old as is right while something is not.
    Often,
    /// Not old at all.
    Anew,
}

impl Network {
    /// Nothing is usual yet.
    pub(crate) fn new(port: u16) -> Self {
        Self {
            port,
            before: None,
            latest: VecDeque::new(),
            usual: 0.0,
            learnt: 0,
        }
    }

    /// Looks. Blocks for up to 10 ms where something waits for word. `None` when no more is sent again than usual, at the first look, and
    /// where the kernel does not tell.
    pub(crate) fn look(&mut self, table: &mut SocketTable, well: bool) -> Option<NetworkSeen> {
        let port = self.port;
        self.look_by(counters()?, well, |which| {
            let lines = match which {
                Reading::Rarely => table.lines(true),
                Reading::Often => table.lines(false),
                Reading::Anew => table.anew(),
            };
            sockets_in(lines, port)
        })
    }

    /// The same with the kernel's counters as they are `now`, and what `read` finds in its table.
    fn look_by(
        &mut self,
        now: Counters,
        well: bool,
        mut read: impl FnMut(Reading) -> Sockets,
    ) -> Option<NetworkSeen> {
        let before = self.before.replace(now)?;
        let grown = Counters {
            sent: now.sent.saturating_sub(before.sent),
            resent: now.resent.saturating_sub(before.resent),
            dropped: now.dropped.saturating_sub(before.dropped),
        };
        // What the table said before the loss would tell against it.
        let loses = self.take(grown, Instant::now());
        let mut sockets = read(if well && !loses {
            Reading::Rarely
        } else {
            Reading::Often
        });
        // It may just be about to read.
        for _ in 0..2 {
            if sockets.unheard > 0 && sockets.unread > 0 {
                std::thread::sleep(AGAIN_AFTER);
                let again = read(Reading::Anew);
                sockets.unread = sockets.unread.min(again.unread);
                sockets.unheard = sockets.unheard.max(again.unheard);
            }
        }
        self.judge(sockets, well)
    }

    /// One more look. Whether far more is sent again than usual.
    fn take(&mut self, grown: Counters, at: Instant) -> bool {
        let is_old = |look: &Look| at - look.at > TOGETHER;
        while self.latest.len() >= LOOKS && self.latest.front().is_some_and(is_old) {
            self.latest.pop_front();
        }
        self.latest.push_back(Look {
            at,
            grown,
            unheard: 0,
        });
        self.is_far()
    }

    /// With what the table says at the look that was taken last.
    fn judge(&mut self, sockets: Sockets, well: bool) -> Option<NetworkSeen> {
        let far = self.is_far();
        let latest = self.latest.back_mut()?;
        latest.unheard = sockets.unheard;
        let grown = latest.grown;
        if well && sockets.unheard == 0 && grown.sent > 0 {
            // Not within the seconds of a loss of which the probes happen to be spared, however few segments there are.
            let settled = self.learnt >= SETTLES && self.share() >= TIMES * self.usual;
            let rate = if settled { LEARNS_FAR } else { LEARNS };
            self.learnt = self.learnt.saturating_add(1);
            self.usual += rate * (grown.resent as f64 / grown.sent as f64 - self.usual);
        }
        far.then(|| NetworkSeen {
            resent: self.share().min(1.0),
            unheard: self.latest.iter().map(|look| look.unheard).max().unwrap_or(0),
            unread: sockets.unread,
            dropped: self.sum(|of| of.dropped),
        })
    }

    fn is_far(&self) -> bool {
        self.sum(|of| of.resent) >= RESENT_MIN && self.share() >= TIMES * self.usual
    }

    fn share(&self) -> f64 {
        self.sum(|of| of.resent) as f64 / (self.sum(|of| of.sent) as f64).max(1.0)
    }

    fn sum(&self, pick: fn(&Counters) -> u64) -> u64 {
        self.latest.iter().map(|look| pick(&look.grown)).sum()
    }
}

fn counters() -> Option<Counters> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let (sent, resent) = segments(&read("/proc/net/snmp")?)?;
    Some(Counters {
        sent,
        resent,
        dropped: dropped(&read("/proc/net/dev").unwrap_or_default()),
    })
}

/// `OutSegs` and `RetransSegs` of the two `Tcp:` lines. Linux counts what is sent again in both, a repeated answer to a connection in the second alone.
fn segments(snmp: &str) -> Option<(u64, u64)> {
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Tcp:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let of = |wanted: &str| -> Option<u64> {
        let at = names.split_ascii_whitespace().position(|name| name == wanted)?;
        values.split_ascii_whitespace().nth(at)?.parse().ok()
    };
    let (out, again) = (of("OutSegs")?, of("RetransSegs")?);
    Some((out.max(again), again))
}

/// Errors and drops of every interface, both ways: fields 3, 4, 11 and 12 after the name.
fn dropped(dev: &str) -> u64 {
    let of_line = |line: &str| -> Option<u64> {
        let (_, fields) = line.split_once(':')?;
        let fields: Vec<u64> = fields
            .split_ascii_whitespace()
            .map(|field| field.parse().unwrap_or(0))
            .collect();
        Some([2, 3, 10, 11].iter().filter_map(|at| fields.get(*at)).sum())
    };
    dev.lines().skip(2).filter_map(of_line).sum()
}

/// Either end of a connection within this host to the port, the way of the probe, tells that it sends again (timer 1, a count above 0). What is
/// lost between others and the service is no reason why the probe has no answer, and anybody could bring it about; neither is a connection that
/// is half open (state 03). The service's own end tells what it has not read, whoever sent it, and the listener what it has not taken.
fn sockets_in(table: &str, port: u16) -> Sockets {
    let mut found = Sockets::default();
    for line in table.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, local, remote, state, queues, timer, again, ..] = fields[..] else {
            continue;
        };
        let is_at = |end: &str| {
            end.rsplit_once(':')
                .is_some_and(|(_, of)| u16::from_str_radix(of, 16) == Ok(port))
        };
        let serves = is_at(local);
        if !(serves || is_at(remote)) {
            continue;
        }
        let resends = timer.starts_with("01:") && u32::from_str_radix(again, 16).is_ok_and(|count| count > 0);
        let is_probes = is_within(local, remote) && state != "03";
        found.unheard += u32::from(resends && is_probes);
        let unread = queues
            .split_once(':')
            .and_then(|(_, unread)| u32::from_str_radix(unread, 16).ok())
            .unwrap_or(0);
        found.unread = found.unread.saturating_add(match state {
            "01" | "08" if serves => u32::from(unread > 0),
            "0A" if serves => unread,
            _ => 0,
        });
    }
    found
}

/// Whether both ends are of this host: on loopback, or at the same address of its own.
fn is_within(local: &str, remote: &str) -> bool {
    let address = |end: &str| end.rsplit_once(':').map(|(address, _)| address.to_owned());
    is_loopback(local) && is_loopback(remote) || address(local) == address(remote)
}

/// As the kernel writes it: words of four bytes, each with its lowest byte first.
fn is_loopback(end: &str) -> bool {
    let address = end.rsplit_once(':').map_or("", |(address, _)| address);
    match address.len() {
        8 => address.ends_with("7F"),
        32 => {
            address == "00000000000000000000000001000000"
                || address.starts_with("0000000000000000FFFF0000") && address.ends_with("7F")
        }
        _ => false,
    }
}

/// Looks that are taken together, and time for which they are, however often it is looked: TCP sends again after 200 ms, then twice as long each time.
const LOOKS: usize = 3;
const TOGETHER: Duration = Duration::from_secs(3);
/// Fewer segments sent again say nothing.
const RESENT_MIN: u64 = 5;
/// So many times the usual share is far above it.
const TIMES: f64 = 10.0;
/// Part of the way to what a look sees that the usual share goes, and while that is far above it.
const LEARNS: f64 = 0.1;
const LEARNS_FAR: f64 = 0.001;
/// Looks after which something is usual.
const SETTLES: u32 = 10;
/// Time after which it is looked again whether something was read.
const AGAIN_AFTER: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_counters_are_read_by_their_names() {
        let snmp = "Ip: Forwarding DefaultTTL\nIp: 1 64\nTcp: RtoMin MaxConn InSegs OutSegs RetransSegs InErrs\n\
                    Tcp: 200 -1 40 50 3 0\nUdp: InDatagrams\nUdp: 9\n";
        assert_eq!(segments(snmp), Some((50, 3)));
        assert_eq!(segments("Tcp: OutSegs\nTcp: 5\n"), None);
        assert_eq!(segments(""), None);
        let dev = "Inter-|   Receive                                                |  Transmit\n \
                   face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
                   lo: 900 9 0 0 0 0 0 0 900 9 0 0 0 0 0 0\n  eth0:1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n";
        assert_eq!(dropped(dev), 3 + 4 + 11 + 12);
        assert!(counters().is_some(), "this host tells");
    }

    #[test]
    fn connections_that_wait_for_word_and_what_was_not_read_are_told_apart() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n";
        let line = |local: &str, remote: &str, state: &str, unread: &str, timer: &str, again: &str| {
            format!("   0: {local} {remote} {state} 00000000:{unread} {timer}:00000014 {again}     0\n")
        };
        let (here, there) = ("0100007F:1F90", "0100007F:A001");
        // Both ends of a lossy way: the client asks again to connect, the service sends its answer again.
        let lossy = [
            line(here, "00000000:0000", "0A", "00000000", "00", "00000000"),
            line(there, here, "02", "00000000", "01", "00000002"),
            line(here, there, "01", "00000000", "01", "00000003"),
            // Sent for the first time, a window that is closed, and others' connections.
            line(here, there, "01", "00000000", "01", "00000000"),
            line(here, there, "01", "00000000", "04", "00000003"),
            line("0100007F:1F91", there, "01", "00000000", "01", "00000003"),
            line(
                "0100000A:A002",
                "0200000A:1F90",
                "02",
                "00000000",
                "01",
                "00000003",
            ),
        ];
        let found = sockets_in(&(head.to_owned() + &lossy.concat()), 8080);
        assert_eq!((found.unheard, found.unread), (2, 0));
        let hung = [
            line(here, "00000000:0000", "0A", "00000005", "00", "00000000"),
            line(there, here, "02", "00000000", "01", "00000002"),
            line(here, there, "01", "00000030", "00", "00000000"),
            line(here, there, "08", "00000031", "00", "00000000"),
            // What the client has not read is the client's.
            line(there, here, "01", "00000030", "00", "00000000"),
        ];
        let found = sockets_in(&(head.to_owned() + &hung.concat()), 8080);
        assert_eq!((found.unheard, found.unread), (1, 7));
        // Somebody scans the port, a phone has left, and the service has read what they sent: its probe is not lost for that.
        let (outside, phone) = ("0200000A:C001", "0300000A:C002");
        let strangers = [
            line(here, outside, "03", "00000000", "01", "00000004"),
            line(here, there, "03", "00000000", "01", "00000004"),
            line("0100000A:1F90", outside, "03", "00000000", "01", "00000002"),
            line("0100000A:1F90", phone, "01", "00000000", "01", "00000009"),
            line(
                "0100000A:A003",
                "0200000A:1F90",
                "01",
                "00000000",
                "01",
                "00000003",
            ),
        ];
        let found = sockets_in(&(head.to_owned() + &strangers.concat()), 8080);
        assert_eq!((found.unheard, found.unread), (0, 0));
        // A probe to an address of the host's own goes no other way, and what a stranger sent has to be read too.
        let own = [
            line(
                "0100000A:A003",
                "0100000A:1F90",
                "02",
                "00000000",
                "01",
                "00000001",
            ),
            line("0100000A:1F90", phone, "01", "00000007", "00", "00000000"),
        ];
        let found = sockets_in(&(head.to_owned() + &own.concat()), 8080);
        assert_eq!((found.unheard, found.unread), (1, 1));
        assert!(is_loopback("00000000000000000000000001000000:1F90"));
        assert!(is_loopback("0000000000000000FFFF00000100007F:1F90"));
        assert!(!is_loopback("0000000000000000FFFF00000100000A:1F90"));
    }

    impl Network {
        /// Two seconds after the look before.
        fn note(&mut self, grown: Counters, sockets: Sockets, well: bool) -> Option<NetworkSeen> {
            let before = self.latest.back().map_or_else(Instant::now, |look| look.at);
            self.take(grown, before + Duration::from_secs(2));
            self.judge(sockets, well)
        }
    }

    #[test]
    fn only_far_more_than_usual_counts_and_a_loss_does_not_become_usual() {
        let mut network = Network::new(8080);
        let grown = |sent, resent| Counters {
            sent,
            resent,
            dropped: 1,
        };
        let calm = Sockets::default();
        for _ in 0..60 {
            assert_eq!(
                network.note(grown(1_000, 2), calm, true),
                None,
                "two in a thousand are usual"
            );
        }
        assert_eq!(
            network.note(grown(1_000, 12), calm, true),
            None,
            "no more than three times that"
        );
        let lost = Sockets {
            unheard: 4,
            unread: 0,
        };
        for _ in 0..200 {
            let seen = network.note(grown(1_000, 200), lost, true);
            assert!(
                seen.is_some_and(|seen| seen.unheard == 4 && seen.dropped == 3),
                "{seen:?}"
            );
        }
        // What clients far away lose is the host's to send again, and becomes usual.
        let mut public = Network::new(8080);
        let seen: Vec<_> = (0..200)
            .map(|_| public.note(grown(100, 6), calm, true).is_some())
            .collect();
        assert!(seen[0] && !seen[120..].contains(&true), "{seen:?}");
        // The first probes of a loss may get through: it is no more usual for that, on a busy host and on one where hardly anything is sent.
        for (sent, calm_resent, lossy_resent) in [(1_000, 0, 20), (1_000, 1, 30), (30, 0, 1)] {
            let mut spared = Network::new(8080);
            for _ in 0..60 {
                spared.note(grown(sent, calm_resent), calm, true);
            }
            for _ in 0..20 {
                spared.note(grown(sent, lossy_resent), calm, true);
            }
            let seen = (0..3).map(|_| spared.note(grown(sent, 3 * lossy_resent), lost, false));
            let seen = seen.last().flatten();
            assert!(seen.is_some_and(|seen| seen.unheard == 4), "{sent} {seen:?}");
        }
        // What the table said before the loss does not count against it, also while probes get through.
        let mut watched = Network::new(8080);
        let mut total = Counters::default();
        let mut read = Vec::new();
        for resent in [[0; 20].as_slice(), &[200, 200]].concat() {
            (total.sent, total.resent) = (total.sent + 1_000, total.resent + resent);
            watched.look_by(total, true, |which| {
                read.push(which);
                calm
            });
        }
        assert_eq!(
            read[17..],
            [Reading::Rarely, Reading::Rarely, Reading::Often, Reading::Often],
            "none at the first look"
        );
        // Looks in quick succession, as while it does not answer, are taken together like slow ones.
        let mut hurried = Network::new(8080);
        for _ in 0..20 {
            hurried.note(grown(1_000, 0), calm, true);
        }
        let mut at = hurried.latest.back().unwrap().at;
        for look in 0..10 {
            at += Duration::from_millis(150);
            hurried.take(grown(20, 1), at);
            let seen = hurried.judge(lost, false);
            assert_eq!(seen.is_some(), look >= 4, "the fifth segment sent again");
        }
        // A quiet host: few segments say nothing.
        let mut quiet = Network::new(8080);
        assert_eq!(quiet.note(grown(6, 2), lost, false), None);
    }
}
