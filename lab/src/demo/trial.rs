//! One fault: inject it, see what the edge makes of it, count what it cost. The campaign repeats these.

use std::time::Duration;

use theriac_edge::status::IncidentView;

use super::record::FaultRecord;
use super::report::markup::{seconds, words};
use super::stage::{DemoError, Stage, unix_ms};
use crate::fleet::fault::Fault;
use crate::fleet::place::SERVICE;

/// Requests that were under way when the fault came belong to it.
const BEFORE_MS: u64 = 50;
/// Failures that show a little after the edge's verdict belong to it too.
const AFTER_MS: u64 = 1_000;
/// Time for a service to become steady before it is harmed.
const STEADY_LIMIT: Duration = Duration::from_secs(25);

/// Injects `fault` into the service of member `index` and follows it until it is healed or `limit` is over.
///
/// A fault that is not injected, not detected or not healed makes the demo fall short but does not end it.
///
/// Gives the course of it, or nothing when it was not injected.
///
/// # Errors
/// [`DemoError`] when the demo as a whole cannot go on.
pub(crate) async fn run(
    stage: &mut Stage,
    index: usize,
    fault: Fault,
    limit: Duration,
) -> Result<Option<Course>, DemoError> {
    let name = stage.cast[index].site.name.clone();
    let doing = format!("waiting until the service of {name} is steady");
    if !stage
        .until(&doing, STEADY_LIMIT, |stage| stage.cast[index].is_steady())
        .await?
    {
        stage.say(&format!(
            "the service of {name} is not steady; the fault comes all the same"
        ));
    }
    let Some(pid) = stage.cast[index].service_pid() else {
        stage.fall_short(format!(
            "{} on {name} was not injected: no process is known",
            fault.title()
        ));
        return Ok(None);
    };
    let injected_unix_ms = unix_ms();
    let (site, client) = (stage.cast[index].site.clone(), stage.client.clone());
    if let Err(error) = fault.inject(&site, pid, &client).await {
        stage.fall_short(format!("{} on {name} was not injected: {error}", fault.title()));
        return Ok(None);
    }
    stage.say(&format!("{name}: {} injected into process {pid}", fault.title()));
    stage.record.faults.push(FaultRecord {
        edge: name.clone(),
        kind: fault.name().to_owned(),
        title: fault.title().to_owned(),
        injected_s: stage.since_began(injected_unix_ms),
        ..FaultRecord::default()
    });
    let doing = format!("waiting until {name} has healed the {}", fault.title());
    let healed = |stage: &Stage| {
        measure(&stage.cast[index].incidents, injected_unix_ms)
            .healed_unix_ms
            .is_some()
    };
    let was_healed = stage.until(&doing, limit, healed).await?;
    // One more second, so that failures that show late are counted.
    let settled = |_: &Stage| unix_ms() > injected_unix_ms + AFTER_MS;
    stage
        .until(&doing, Duration::from_millis(AFTER_MS), settled)
        .await?;
    let course = note(stage, index, injected_unix_ms);
    if !was_healed {
        fault.undo(&site, pid, &client).await;
        let found = stage.record.faults.last().and_then(|fault| fault.detected_s);
        let found = found.map_or("not detected".to_owned(), |after| {
            format!("detected after {}", seconds(after))
        });
        let limit = limit.as_secs();
        stage.fall_short(format!(
            "{} on {name} was {found} and not healed within {limit} s",
            fault.title()
        ));
    }
    Ok(Some(course))
}

/// What the incidents since an injection amount to.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Course {
    pub(crate) detected_unix_ms: Option<u64>,
    pub(crate) healed_unix_ms: Option<u64>,
    pub(crate) action: String,
    pub(crate) class: String,
    pub(crate) causes: Vec<String>,
    /// Actions taken, and how many of them did harm.
    pub(crate) actions: u64,
    pub(crate) harmful: u64,
}

/// Reads the course of a fault out of the incidents of the service.
///
/// Detection is the first incident since the injection. An incident that was open already (something unusual a moment before)
/// takes the fault in; then the edge's action is the first sign that it noticed.
pub(crate) fn measure(incidents: &[IncidentView], injected_unix_ms: u64) -> Course {
    let noticed = |incident: &IncidentView| {
        let acted = incident.acted_unix_ms.filter(|acted| *acted >= injected_unix_ms);
        Some(incident.detected_unix_ms)
            .filter(|detected| *detected >= injected_unix_ms)
            .or(acted)
    };
    let since: Vec<(u64, &IncidentView)> = incidents
        .iter()
        .filter(|incident| incident.service == SERVICE)
        .filter_map(|incident| Some((noticed(incident)?, incident)))
        .collect();
    let healed = since
        .iter()
        .filter(|(_, i)| i.action.is_some() && i.verdict.as_deref() == Some("healed"));
    let healed = healed
        .filter(|(_, i)| i.healed_unix_ms.is_some())
        .min_by_key(|(_, i)| i.healed_unix_ms);
    let Some(first) = since.iter().min_by_key(|(noticed, _)| *noticed) else {
        return Course::default();
    };
    let told = healed.unwrap_or(first).1;
    Course {
        detected_unix_ms: Some(first.0),
        healed_unix_ms: healed.and_then(|(_, incident)| incident.healed_unix_ms),
        action: told.action.clone().unwrap_or_else(|| "none".to_owned()),
        class: told.class.clone(),
        causes: told.causes.clone(),
        actions: since
            .iter()
            .filter(|(_, incident)| incident.acted_unix_ms.is_some())
            .count() as u64,
        harmful: since
            .iter()
            .filter(|(_, incident)| incident.verdict.as_deref() == Some("harm"))
            .count() as u64,
    }
}

fn note(stage: &mut Stage, index: usize, injected_unix_ms: u64) -> Course {
    let member = &stage.cast[index];
    let course = measure(&member.incidents, injected_unix_ms);
    let after = |moment: u64| moment.saturating_sub(injected_unix_ms) as f64 / 1e3;
    let until = course.healed_unix_ms.unwrap_or_else(unix_ms) + AFTER_MS;
    let window = injected_unix_ms.saturating_sub(BEFORE_MS)..=until;
    let failures = member
        .traffic
        .as_ref()
        .map(|traffic| traffic.snapshot().failures)
        .unwrap_or_default();
    let failed = failures
        .iter()
        .filter(|failure| window.contains(&failure.unix_ms))
        .count() as u64;
    let line = course.healed_unix_ms.map(|healed| {
        format!(
            "{}: healthy again {} after the fault, {failed} requests failed",
            member.site.name,
            seconds(after(healed))
        )
    });
    if let Some(record) = stage.record.faults.last_mut() {
        record.detected_s = course.detected_unix_ms.map(after);
        record.healed_s = course.healed_unix_ms.map(after);
        record.failed_requests = failed;
        record.action = words(&course.action);
        record.class.clone_from(&course.class);
        record.causes.clone_from(&course.causes);
    }
    if let Some(line) = line {
        stage.say(&line);
    }
    course
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incident(detected: u64, healed: Option<u64>, verdict: Option<&str>) -> IncidentView {
        IncidentView {
            id: detected,
            service: SERVICE.to_owned(),
            class: "crash".to_owned(),
            state: "closed".to_owned(),
            score: None,
            causes: vec!["exit".to_owned()],
            opened_unix_ms: detected,
            detected_unix_ms: detected,
            acted_unix_ms: Some(detected + 10),
            healed_unix_ms: healed,
            action: Some("start".to_owned()),
            actions: Vec::new(),
            verdict: verdict.map(str::to_owned),
            handed_over: None,
            plan: None,
        }
    }

    #[test]
    fn an_earlier_incident_is_not_counted_as_detection() {
        let earlier = incident(900, Some(950), Some("healed"));
        assert_eq!(measure(std::slice::from_ref(&earlier), 1_000), Course::default());
        let course = measure(&[earlier, incident(1_200, Some(1_900), Some("healed"))], 1_000);
        assert_eq!(
            (course.detected_unix_ms, course.healed_unix_ms),
            (Some(1_200), Some(1_900))
        );
    }

    #[test]
    fn a_fault_that_joins_an_open_incident_counts_from_the_action() {
        let mut joined = incident(700, Some(1_600), Some("healed"));
        joined.acted_unix_ms = Some(1_050);
        let course = measure(&[joined], 1_000);
        assert_eq!(
            (course.detected_unix_ms, course.healed_unix_ms),
            (Some(1_050), Some(1_600))
        );
        let mut host = incident(1_100, Some(1_600), Some("healed"));
        host.service = "host".to_owned();
        assert_eq!(
            measure(&[host], 1_000),
            Course::default(),
            "the host is not the service"
        );
    }

    #[test]
    fn healing_counts_only_with_its_verdict() {
        let course = measure(&[incident(1_200, None, Some("no_effect"))], 1_000);
        assert_eq!(
            (course.detected_unix_ms, course.healed_unix_ms),
            (Some(1_200), None)
        );
        let course = measure(
            &[
                incident(1_200, None, Some("harm")),
                incident(1_500, Some(2_000), Some("healed")),
            ],
            1_000,
        );
        assert_eq!(
            (course.detected_unix_ms, course.healed_unix_ms),
            (Some(1_200), Some(2_000))
        );
        assert_eq!((course.actions, course.harmful), (2, 1));
    }
}
