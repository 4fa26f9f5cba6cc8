//! How many handshakes a source address may begin: a token bucket for each, in a table of bounded size.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Addresses that are remembered. A bucket that is full again is forgotten, so only busy ones stay.
const ADDRESSES_MAX: usize = 4096;

/// Shortest time between two sweeps of the table.
const SWEEP_INTERVAL: Duration = Duration::from_millis(250);

/// Two tables: addresses that proved themselves by a Retry, and those that did not. Who forges addresses can use up,
/// or fill, only the second; a real site then answers a Retry and is in the first.
#[derive(Debug)]
pub(crate) struct AddressBudgets {
    proven: AddressBudget,
    unproven: AddressBudget,
}

impl AddressBudgets {
    pub(crate) fn new(burst: u32, per_second: u32) -> Self {
        Self {
            proven: AddressBudget::new(burst, per_second),
            unproven: AddressBudget::new(burst, per_second),
        }
    }

    /// Whether this address may begin one more handshake now.
    pub(crate) fn take(&mut self, address: IpAddr, proven: bool, now: Instant) -> bool {
        let budget = if proven {
            &mut self.proven
        } else {
            &mut self.unproven
        };
        budget.take(address, now)
    }
}

#[derive(Debug)]
struct AddressBudget {
    burst: f64,
    per_second: f64,
    buckets: BTreeMap<IpAddr, Bucket>,
    swept: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl AddressBudget {
    fn new(burst: u32, per_second: u32) -> Self {
        Self {
            burst: f64::from(burst),
            per_second: f64::from(per_second),
            buckets: BTreeMap::new(),
            swept: None,
        }
    }

    fn take(&mut self, address: IpAddr, now: Instant) -> bool {
        let key = source(address);
        if !self.buckets.contains_key(&key) && self.buckets.len() >= ADDRESSES_MAX {
            self.sweep(now);
            if self.buckets.len() >= ADDRESSES_MAX {
                // Thousands of busy addresses: a new one waits.
                return false;
            }
        }
        let bucket = self.buckets.entry(key).or_insert(Bucket {
            tokens: self.burst,
            at: now,
        });
        let tokens = bucket.refilled(self.burst, self.per_second, now);
        let granted = tokens >= 1.0;
        *bucket = Bucket {
            tokens: if granted { tokens - 1.0 } else { tokens },
            at: now,
        };
        granted
    }

    /// Forgets the full buckets. Seldom: in a flood of forged addresses it would cost more than it frees.
    fn sweep(&mut self, now: Instant) {
        if self
            .swept
            .is_some_and(|swept| now.saturating_duration_since(swept) < SWEEP_INTERVAL)
        {
            return;
        }
        self.swept = Some(now);
        let (burst, per_second) = (self.burst, self.per_second);
        self.buckets
            .retain(|_, bucket| bucket.refilled(burst, per_second, now) < burst);
    }
}

impl Bucket {
    fn refilled(&self, burst: f64, per_second: f64, now: Instant) -> f64 {
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        (self.tokens + seconds * per_second).min(burst)
    }
}

/// IPv4 as it is, IPv6 by its /64: one household or machine can pick any address within.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn taken(budget: &mut AddressBudget, from: &str, now: Instant, tries: usize) -> usize {
        (0..tries).filter(|_| budget.take(address(from), now)).count()
    }

    #[test]
    fn an_address_gets_its_burst_and_then_its_rate() {
        let (mut budget, now) = (AddressBudget::new(5, 2), Instant::now());
        assert_eq!(taken(&mut budget, "192.0.2.1", now, 20), 5);
        assert_eq!(
            taken(&mut budget, "192.0.2.1", now + Duration::from_secs(1), 20),
            2
        );
        assert_eq!(
            taken(&mut budget, "192.0.2.1", now + Duration::from_mins(1), 20),
            5
        );
        assert_eq!(taken(&mut budget, "192.0.2.2", now, 20), 5);
    }

    #[test]
    fn forged_packets_do_not_use_up_the_budget_of_the_real_address() {
        let (mut budgets, now) = (AddressBudgets::new(5, 2), Instant::now());
        for number in 0..10_000_u32 {
            budgets.take(IpAddr::from(number.to_be_bytes()), false, now);
            budgets.take(address("192.0.2.1"), false, now);
        }
        assert!(!budgets.take(address("192.0.2.1"), false, now));
        assert_eq!(
            (0..9)
                .filter(|_| budgets.take(address("192.0.2.1"), true, now))
                .count(),
            5
        );
    }

    #[test]
    fn one_v6_network_has_one_budget() {
        let (mut budget, now) = (AddressBudget::new(5, 2), Instant::now());
        assert_eq!(taken(&mut budget, "2001:db8::1", now, 3), 3);
        assert_eq!(taken(&mut budget, "2001:db8::ffff:2", now, 20), 2);
        assert_eq!(taken(&mut budget, "2001:db8:0:1::1", now, 20), 5);
        assert_eq!(taken(&mut budget, "::ffff:192.0.2.9", now, 3), 3);
        assert_eq!(taken(&mut budget, "192.0.2.9", now, 20), 2);
    }

    #[test]
    fn the_table_stays_bounded_and_forgets_the_quiet() {
        let (mut budget, now) = (AddressBudget::new(5, 2), Instant::now());
        for number in 0..20_000_u32 {
            budget.take(IpAddr::from(number.to_be_bytes()), now);
        }
        assert_eq!(budget.buckets.len(), ADDRESSES_MAX);
        assert!(!budget.take(address("192.0.2.1"), now));
        assert!(budget.take(address("192.0.2.1"), now + Duration::from_secs(10)));
        assert_eq!(budget.buckets.len(), 1);
    }
}
