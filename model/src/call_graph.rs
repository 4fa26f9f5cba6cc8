//! Which service is to blame when services call each other.
//!
//! A fault is seen in every caller up to the one that raised the alarm, so the service that deviates most is often not the
//! one that is broken. What is told apart here is what a service adds itself from what it only passes on.
//!
//! The measure is the **excess**: requests × (what one request costs now − what it usually costs), with the cost in seconds for
//! latency and in failures for availability. It is additive along calls, in one unit for all services: a caller's excess
//! holds that of what it calls, and a busy service that became a little slower weighs more than an endpoint that was called
//! once and took long. A service's own part is its excess less the greatest excess among the services that it calls
//! (the greatest, not the sum: calls in parallel are waited for once). A deviation in units of the usual spread has no such
//! meaning across services, since the spreads differ by orders of magnitude. Measured by `theriac-lab causes`.

/// Why there is no graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallGraphError {
    /// A call names a service that is not there.
    #[error("a call from {caller} to {callee}, but there are only {services} services")]
    UnknownService {
        /// Number of the caller.
        caller: usize,
        /// Number of the called.
        callee: usize,
        /// Number of services.
        services: usize,
    },
}

/// Services, by number, and whom each calls. Cycles are allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallGraph {
    callees: Vec<Vec<usize>>,
}

/// One service's part in an incident.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankedService {
    /// Its number.
    pub service: usize,
    /// Its excess, what it passes on included.
    pub excess: f64,
    /// What it adds itself; below 0 when it passes on less than what it calls lost.
    pub own: f64,
}

impl CallGraph {
    /// A graph of `services` services; each call is (caller, callee). Doubles and calls to oneself are left out.
    ///
    /// # Errors
    /// [`CallGraphError::UnknownService`].
    pub fn new(
        services: usize,
        calls: impl IntoIterator<Item = (usize, usize)>,
    ) -> Result<Self, CallGraphError> {
        let mut callees = vec![Vec::new(); services];
        for (caller, callee) in calls {
            if caller.max(callee) >= services {
                return Err(CallGraphError::UnknownService {
                    caller,
                    callee,
                    services,
                });
            }
            let known: &mut Vec<usize> = &mut callees[caller];
            if caller != callee && !known.contains(&callee) {
                known.push(callee);
            }
        }
        Ok(Self { callees })
    }

    /// Number of services.
    pub fn services(&self) -> usize {
        self.callees.len()
    }

    /// Whom a service calls; empty for a service that is not there.
    pub fn callees(&self, service: usize) -> &[usize] {
        self.callees.get(service).map_or(&[], Vec::as_slice)
    }

    /// The service and everything that it calls, directly or not: what can be the cause of its trouble.
    pub fn reachable(&self, from: usize) -> Vec<bool> {
        let mut seen = vec![false; self.services()];
        let mut open = vec![from];
        while let Some(service) = open.pop() {
            if seen.get(service) == Some(&false) {
                seen[service] = true;
                open.extend(self.callees(service));
            }
        }
        seen
    }

    /// Ranks the alarmed service and everything that it calls by their own part of the excess, greatest first, ties by
    /// number. `excesses[i]` is that of service `i`; a missing one (NaN, or beyond the end) counts as 0.
    pub fn rank(&self, alarmed: usize, excesses: &[f64]) -> Vec<RankedService> {
        let excess = |service: usize| {
            let known = excesses.get(service).copied();
            known.filter(|excess| excess.is_finite()).unwrap_or(0.0)
        };
        let mut ranked: Vec<RankedService> = self
            .reachable(alarmed)
            .into_iter()
            .enumerate()
            .filter(|(_, reachable)| *reachable)
            .map(|(service, _)| {
                let passed_on = self.callees(service).iter().map(|callee| excess(*callee));
                RankedService {
                    service,
                    excess: excess(service),
                    own: excess(service) - passed_on.fold(0.0, f64::max),
                }
            })
            .collect();
        ranked.sort_by(|a, b| b.own.total_cmp(&a.own));
        ranked
    }
}

/// requests × (cost now − usual cost); 0 where one of them is missing.
pub fn excess(requests: f64, cost: f64, usual: f64) -> f64 {
    let excess = requests * (cost - usual);
    if excess.is_finite() { excess } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(graph: &CallGraph, excesses: &[f64]) -> Vec<usize> {
        graph
            .rank(0, excesses)
            .iter()
            .map(|ranked| ranked.service)
            .collect()
    }

    /// 0 calls 1 and 2, 1 calls 3; 4 calls 0.
    fn graph() -> CallGraph {
        CallGraph::new(5, [(0, 1), (0, 2), (1, 3), (4, 0), (0, 1), (2, 2)]).unwrap()
    }

    #[test]
    fn blames_the_deepest_service_that_explains_its_callers() {
        assert_eq!(order(&graph(), &[10.0, 10.0, 0.0, 9.5, 10.0])[0], 3);
        // The database is fine: what lies between it and the caller is to blame.
        assert_eq!(order(&graph(), &[10.0, 10.0, 0.0, 0.1, 10.0])[0], 1);
        assert_eq!(order(&graph(), &[10.0, 1.0, 1.0, 1.0, 10.0])[0], 0);
    }

    #[test]
    fn callers_of_the_alarmed_service_are_never_blamed() {
        assert!(!order(&graph(), &[1.0, 0.0, 0.0, 0.0, 99.0]).contains(&4));
    }

    #[test]
    fn an_endpoint_called_once_does_not_outweigh_a_busy_one() {
        let excesses = [0.0, excess(1.0, 2.0, 0.05), excess(280.0, 0.2, 0.07)];
        let graph = CallGraph::new(3, [(0, 1), (0, 2)]).unwrap();
        assert_eq!(order(&graph, &excesses)[0], 2);
    }

    #[test]
    fn missing_values_and_cycles_end_in_a_ranking() {
        let graph = CallGraph::new(3, [(0, 1), (1, 2), (2, 0)]).unwrap();
        let ranked = graph.rank(0, &[f64::NAN, 5.0]);
        assert_eq!(ranked.len(), 3);
        assert_eq!(ranked[0].service, 1);
        assert!(excess(f64::NAN, 1.0, 0.0).abs() < 1e-12 && excess(3.0, f64::NAN, 0.0).abs() < 1e-12);
        assert!(
            graph.rank(9, &[]).is_empty(),
            "a service that is not there reaches nothing"
        );
        assert!(CallGraph::new(2, [(0, 2)]).is_err());
    }
}
