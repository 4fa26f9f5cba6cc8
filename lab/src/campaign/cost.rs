//! What the proxy before a service costs its clients.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::fleet::http::Client;

/// Requests on each way.
const REQUESTS: u32 = 500;
/// What is asked: it costs the service next to nothing.
const PATH: &str = "/healthz";
/// A request that takes longer is left out on both ways.
const LIMIT: Duration = Duration::from_secs(1);

/// Times of requests straight to a service and through its proxy, one after the other in turn, over connections that stay open; under the
/// campaign's own load.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ProxyCost {
    /// Pairs that were answered.
    pub requests: usize,
    /// Straight: the median and the 99th percentile, milliseconds.
    pub direct_ms: [f64; 2],
    /// Through the proxy.
    pub through_ms: [f64; 2],
}

impl ProxyCost {
    /// In words.
    pub fn told(&self) -> String {
        let [direct, direct_p99] = self.direct_ms;
        let [through, through_p99] = self.through_ms;
        format!(
            "the proxy adds {:.2} ms in the median ({through:.2} after {direct:.2} ms) and {:.2} ms at the 99th percentile ({through_p99:.2} \
             after {direct_p99:.2} ms), {} requests each",
            through - direct,
            through_p99 - direct_p99,
            self.requests
        )
    }
}

/// Measures it; nothing where nobody answers.
pub(super) async fn measure(through: SocketAddr, direct: SocketAddr) -> Option<ProxyCost> {
    let client = Client::new(LIMIT);
    let (mut one, mut other) = (Vec::new(), Vec::new());
    for number in 0..REQUESTS {
        // Each way is the first as often as the other.
        let turn = if number % 2 == 0 {
            [direct, through]
        } else {
            [through, direct]
        };
        let mut took = [0.0; 2];
        let mut answered = true;
        for at in turn {
            let begun = Instant::now();
            answered &= client.get(at, PATH).await.is_ok();
            took[usize::from(at == through)] = 1e3 * begun.elapsed().as_secs_f64();
        }
        if answered {
            one.push(took[0]);
            other.push(took[1]);
        }
    }
    Some(ProxyCost {
        requests: one.len(),
        direct_ms: of(&mut one)?,
        through_ms: of(&mut other)?,
    })
}

/// The median and the 99th percentile.
fn of(times: &mut [f64]) -> Option<[f64; 2]> {
    times.sort_by(f64::total_cmp);
    let at = |hundredths: usize| {
        times
            .get(times.len().saturating_sub(1) * hundredths / 100)
            .copied()
    };
    Some([at(50)?, at(99)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_adds_is_told_for_the_median_and_the_slowest_hundredth() {
        let mut times: Vec<f64> = (0..=200).rev().map(f64::from).collect();
        assert_eq!(of(&mut times), Some([100.0, 198.0]));
        assert_eq!(of(&mut []), None);
        let cost = ProxyCost {
            requests: 9,
            direct_ms: [0.5, 2.0],
            through_ms: [0.75, 4.0],
        };
        let told = cost.told();
        assert!(
            told.contains("adds 0.25 ms in the median") && told.contains("2.00 ms at the 99th"),
            "{told}"
        );
    }
}
