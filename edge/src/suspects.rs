//! Which of the services that a sick service depends on is to be looked at first.
//!
//! The operator says who calls whom (`depends_on`); the recorded incidents say who was in trouble at the time. A service in
//! trouble none of whose own dependencies were is where the trouble begins
//! ([`theriac_model::call_graph`] with one unit of trouble a service; the edge counts no requests).

use std::time::Duration;

use serde::Serialize;
use theriac_heal::types::Incident;
use theriac_model::call_graph::CallGraph;

use crate::config::ServiceConfig;

/// Trouble of a dependency counts when it was first seen so long after that of its caller at the latest: callers often notice
/// first.
const LATER_MAX: Duration = Duration::from_mins(1);
/// … or had ended so long before it at the earliest.
const EARLIER_MAX: Duration = Duration::from_mins(1);

/// A dependency in trouble.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Suspect {
    /// Its name.
    pub service: String,
    /// Its incident.
    pub incident: u64,
    /// What kind of trouble it is taken to be.
    pub class: String,
    /// First sign of it, milliseconds since the Unix epoch.
    pub opened_unix_ms: u64,
    /// Whether its trouble begins there: nothing that it depends on itself was in trouble.
    pub origin: bool,
}

/// Dependencies of the incident's service that were in trouble around its first sign: those where it begins before those
/// that pass it on, earliest first. `others` may hold incidents of any service, this one too.
pub fn suspects(services: &[ServiceConfig], incident: &Incident, others: &[Incident]) -> Vec<Suspect> {
    let number = |name: &str| services.iter().position(|service| service.name.as_str() == name);
    let Some(alarmed) = number(&incident.service) else {
        return Vec::new();
    };
    let calls = services.iter().enumerate().flat_map(|(caller, service)| {
        service
            .depends_on
            .iter()
            .filter_map(move |callee| Some((caller, number(callee)?)))
    });
    let Ok(graph) = CallGraph::new(services.len(), calls) else {
        return Vec::new();
    };
    let mut trouble: Vec<Option<&Incident>> = vec![None; services.len()];
    for other in others.iter().filter(|other| overlaps(incident, other)) {
        let Some(service) = number(&other.service) else {
            continue;
        };
        // Of several the nearest: an earlier one may have been healed long before.
        let apart = |of: &Incident| of.opened.unix_ms.abs_diff(incident.opened.unix_ms);
        let nearest = &mut trouble[service];
        if nearest.is_none_or(|nearest| apart(other) < apart(nearest)) {
            *nearest = Some(other);
        }
    }
    let excesses: Vec<f64> = trouble
        .iter()
        .map(|found| f64::from(u8::from(found.is_some())))
        .collect();
    let mut suspects: Vec<Suspect> = graph
        .rank(alarmed, &excesses)
        .into_iter()
        .filter(|ranked| ranked.service != alarmed)
        .filter_map(|ranked| {
            let found = trouble[ranked.service]?;
            Some(Suspect {
                service: found.service.clone(),
                incident: found.id.0,
                class: found.class.to_string(),
                opened_unix_ms: found.opened.unix_ms,
                origin: ranked.own > 0.5,
            })
        })
        .collect();
    suspects.sort_by_key(|suspect| (!suspect.origin, suspect.opened_unix_ms, suspect.incident));
    suspects
}

/// In words, for the end of `incidents why`; empty for no suspects.
pub fn words(suspects: &[Suspect], incident: &Incident) -> String {
    let line = |suspect: &Suspect| {
        let (opened, own) = (suspect.opened_unix_ms, incident.opened.unix_ms);
        let seconds = Duration::from_millis(opened.abs_diff(own)).as_secs_f64();
        let way = if opened <= own { "before" } else { "after" };
        let part = if suspect.origin {
            ""
        } else {
            ", which passes on trouble of its own dependencies"
        };
        format!(
            "  {:<18} {} (incident {}), {seconds:.1} s {way}{part}\n",
            suspect.service, suspect.class, suspect.incident
        )
    };
    if suspects.is_empty() {
        return String::new();
    }
    let lines: String = suspects.iter().map(line).collect();
    format!(
        "\n{} depends on services that were in trouble; look first at:\n{lines}",
        incident.service
    )
}

fn overlaps(incident: &Incident, other: &Incident) -> bool {
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let own = incident.opened.unix_ms;
    let begun = other.opened.unix_ms <= own.saturating_add(ms(LATER_MAX));
    let lasted = other
        .closed
        .is_none_or(|closed| closed.unix_ms.saturating_add(ms(EARLIER_MAX)) >= own);
    other.id != incident.id && begun && lasted
}

#[cfg(test)]
mod tests {
    use theriac_heal::types::{FaultClass, IncidentId, IncidentState, When};

    use super::*;
    use crate::config::{EdgeConfig, EdgeSettings};

    /// `shop` calls `api`, `api` calls `db`; `mail` stands alone.
    fn services() -> Vec<ServiceConfig> {
        let text = r#"
            [[service]]
            name = "shop"
            argv = ["/bin/true"]
            depends_on = ["api"]
            [[service]]
            name = "api"
            argv = ["/bin/true"]
            depends_on = ["db"]
            [[service]]
            name = "db"
            argv = ["/bin/true"]
            [[service]]
            name = "mail"
            argv = ["/bin/true"]
        "#;
        let settings: EdgeSettings = toml::from_str(text).unwrap();
        EdgeConfig::check(settings, &|_| None).unwrap().services
    }

    fn incident(id: u64, service: &str, opened_s: u64, closed_s: Option<u64>) -> Incident {
        let when = |s: u64| When {
            monotonic_ms: s * 1_000,
            unix_ms: s * 1_000,
        };
        Incident {
            id: IncidentId(id),
            service: service.to_owned(),
            class: FaultClass::Hang,
            state: IncidentState::Open,
            opened: when(opened_s),
            detected: when(opened_s),
            acted: None,
            healed: None,
            closed: closed_s.map(when),
            score: None,
            threshold: None,
            evidence: Vec::new(),
            evidence_dropped: 0,
            causes: Vec::new(),
            hypotheses: Vec::new(),
            alternatives: Vec::new(),
            would: None,
            plan: None,
            approved_by: std::collections::BTreeSet::new(),
            actions: Vec::new(),
            verdict: None,
            handed_over: None,
        }
    }

    #[test]
    fn the_deepest_dependency_in_trouble_comes_first() {
        let own = incident(1, "shop", 1_000, None);
        let others = [
            own.clone(),
            incident(2, "api", 995, None),
            incident(3, "db", 1_002, None),
            incident(4, "mail", 990, None),
        ];
        let found = suspects(&services(), &own, &others);
        let names: Vec<(&str, bool)> = found.iter().map(|s| (s.service.as_str(), s.origin)).collect();
        assert_eq!(names, [("db", true), ("api", false)]);
        let told = words(&found, &own);
        assert!(told.contains("hang (incident 3), 2.0 s after\n"), "{told}");
        assert!(told.contains("5.0 s before, which passes on"), "{told}");
    }

    #[test]
    fn trouble_long_before_or_after_and_trouble_of_callers_is_no_suspect() {
        let own = incident(1, "api", 1_000, None);
        let others = [
            incident(2, "db", 100, Some(900)),
            incident(3, "db", 1_100, None),
            incident(4, "shop", 1_000, None),
        ];
        assert!(suspects(&services(), &own, &others).is_empty());
        assert_eq!(words(&[], &own), "");
        let just = [incident(2, "db", 100, Some(970))];
        assert_eq!(suspects(&services(), &own, &just).len(), 1);
        assert!(suspects(&services(), &incident(1, "host", 1_000, None), &just).is_empty());
    }
}
