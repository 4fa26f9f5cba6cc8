//! The demo's eyes: reads every page a few times a second, keeps the record, draws the view, and waits for conditions
//! with deadlines. Nothing here sleeps in the hope that something has happened.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use theriac_edge::status::{Federation, IncidentView, Status};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::record::{ActionMark, EdgeRecord, Record, RoundRecord, ScorePoint};
use super::report::markup::words;
use super::view::{Now, View};
use crate::fleet::http::{Client, HttpError};
use crate::fleet::place::{Centre, SERVICE, Site};
use crate::fleet::process::{ProcessError, Processes};
use crate::fleet::status::RoundRow;
use crate::traffic::Traffic;

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Why the demo cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DemoError {
    /// Ctrl-C or TERM.
    #[error("interrupted; every process is stopped")]
    Interrupted,
    /// A process could not be started or ended too early.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A file could not be written or read.
    #[error("{0}: {1}")]
    File(String, std::io::Error),
    /// A program said something that was not expected.
    #[error("{0}")]
    Unexpected(String),
}

/// Everything that the demo holds while it runs.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) record: Record,
    pub(crate) processes: Processes,
    pub(crate) cast: Vec<Member>,
    pub(crate) client: Client,
    view: View,
    centre: Option<Centre>,
    began: Instant,
    began_unix_ms: u64,
    planned_s: f64,
    interrupted: watch::Receiver<bool>,
    refused_seen: bool,
}

/// One edge with what is known of it.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) site: Site,
    pub(crate) hostile: bool,
    pub(crate) status: Option<Status>,
    pub(crate) incidents: Vec<IncidentView>,
    pub(crate) traffic: Option<Traffic>,
    told: BTreeMap<u64, String>,
}

impl Member {
    /// Whether its service runs, answers, and nothing is being done to it.
    pub(crate) fn is_steady(&self) -> bool {
        let service = |status: &Status| {
            status
                .services
                .iter()
                .any(|s| s.name == SERVICE && s.healthy && !s.alarm)
        };
        let ours = |incident: &&IncidentView| incident.service == SERVICE;
        self.status.as_ref().is_some_and(service) && self.incidents.iter().filter(ours).all(is_closed)
    }

    /// The process of its service.
    pub(crate) fn service_pid(&self) -> Option<u32> {
        let status = self.status.as_ref()?;
        status
            .services
            .iter()
            .find(|service| service.name == SERVICE)?
            .pid
    }

    /// Whether it scores every sample.
    pub(crate) fn is_watching(&self) -> bool {
        let scored = |status: &Status| {
            status
                .services
                .iter()
                .any(|s| s.name == SERVICE && s.score.is_some())
        };
        self.status.as_ref().is_some_and(scored)
    }

    /// Whether the aggregator has welcomed it.
    pub(crate) fn is_connected(&self) -> bool {
        self.status
            .as_ref()
            .is_some_and(|status| status.federation == Federation::Connected)
    }
}

impl Stage {
    pub(crate) fn new(
        processes: Processes,
        view: View,
        centre: Option<Centre>,
        sites: Vec<(Site, bool)>,
        planned_s: f64,
        interrupted: watch::Receiver<bool>,
    ) -> Self {
        let edges = sites
            .iter()
            .map(|(site, hostile)| EdgeRecord {
                name: site.name.clone(),
                hostile: *hostile,
                ..EdgeRecord::default()
            })
            .collect();
        let member = |(site, hostile)| Member {
            site,
            hostile,
            status: None,
            incidents: Vec::new(),
            traffic: None,
            told: BTreeMap::new(),
        };
        Self {
            record: Record {
                edges,
                ..Record::default()
            },
            processes,
            cast: sites.into_iter().map(member).collect(),
            client: Client::new(Duration::from_secs(1)),
            view,
            centre,
            began: Instant::now(),
            began_unix_ms: unix_ms(),
            planned_s,
            interrupted,
            refused_seen: false,
        }
    }

    /// Seconds since the demo began.
    pub(crate) fn now_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// A moment on the wall clock as seconds since the demo began.
    pub(crate) fn since_began(&self, unix_ms: u64) -> f64 {
        (unix_ms as f64 - self.began_unix_ms as f64) / 1e3
    }

    /// Says something that stays on the screen.
    pub(crate) fn say(&mut self, text: &str) {
        let at_s = self.now_s();
        self.view.say(at_s, text);
    }

    /// Notes something that makes the demo fail, and goes on.
    pub(crate) fn fall_short(&mut self, what: String) {
        self.say(&format!("fell short: {what}"));
        self.record.shortfalls.push(what);
    }

    /// Looks again and again until `condition` holds (`true`) or `limit` is over (`false`).
    ///
    /// # Errors
    /// [`DemoError::Interrupted`], or [`DemoError::Process`] when a process has ended.
    pub(crate) async fn until(
        &mut self,
        doing: &str,
        limit: Duration,
        condition: impl Fn(&Self) -> bool,
    ) -> Result<bool, DemoError> {
        let deadline = Instant::now() + limit;
        loop {
            self.look().await;
            self.processes.check()?;
            self.record.seconds = self.now_s();
            self.view.draw(
                &self.record,
                Now {
                    at_s: self.record.seconds,
                    planned_s: self.planned_s,
                    doing,
                },
            );
            if condition(self) {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                _ = self.interrupted.wait_for(|interrupted| *interrupted) => return Err(DemoError::Interrupted),
            }
        }
    }

    /// Closes the view and hands out what remains: the record and the processes.
    pub(crate) fn end(mut self) -> (Record, Processes, Vec<Member>) {
        self.view.close();
        self.record.count_unprovoked();
        (self.record, self.processes, self.cast)
    }

    /// Reads every page once, all at the same time. A page that does not answer leaves things as they were.
    async fn look(&mut self) {
        let mut pages = JoinSet::new();
        for (index, member) in self.cast.iter().enumerate() {
            let (client, page) = (self.client.clone(), member.site.page);
            pages.spawn(async move {
                let status = client.json::<Status>(page, "/status").await;
                let incidents = client.json::<Vec<IncidentView>>(page, "/incidents").await;
                Page::Edge(index, status, incidents)
            });
        }
        if let Some(page) = self.centre.as_ref().map(|centre| centre.page) {
            let client = self.client.clone();
            pages.spawn(async move {
                let status = client
                    .json::<theriac_aggregator::status::Status>(page, "/status")
                    .await;
                let rounds = client.json::<Vec<RoundRow>>(page, "/rounds").await;
                Page::Aggregator(status, rounds)
            });
        }
        let mut lines = Vec::new();
        while let Some(page) = pages.join_next().await {
            match page {
                Ok(Page::Edge(index, status, incidents)) => {
                    if let Ok(status) = status {
                        self.take_status(index, status, &mut lines);
                    }
                    if let Ok(incidents) = incidents {
                        self.take_incidents(index, incidents, &mut lines);
                    }
                }
                Ok(Page::Aggregator(status, rounds)) => {
                    if let Ok(status) = status {
                        self.take_aggregator(status, &mut lines);
                    }
                    if let Ok(rounds) = rounds {
                        self.take_rounds(rounds, &mut lines);
                    }
                }
                Err(error) => tracing::error!(%error, "a look at a page failed"),
            }
        }
        for member in &self.cast {
            let Some((traffic, edge)) = member
                .traffic
                .as_ref()
                .zip(self.record.edge_mut(&member.site.name))
            else {
                continue;
            };
            let seen = traffic.snapshot();
            (edge.requests, edge.requests_failed) = (seen.requests, seen.failed);
        }
        for line in lines {
            self.say(&line);
        }
    }

    fn take_status(&mut self, index: usize, status: Status, lines: &mut Vec<String>) {
        let at_s = self.now_s();
        let member = &mut self.cast[index];
        let Some(edge) = self.record.edges.get_mut(index) else {
            return;
        };
        edge.phase = if member.hostile {
            "lying".to_owned()
        } else {
            enum_word(&status.phase)
        };
        edge.federation = enum_word(&status.federation);
        edge.warm_up = (status.rows, status.warm_up_rows);
        edge.model_version = status.model_version;
        edge.gate.clone_from(&status.gate);
        edge.epsilon = status.epsilon_spent.unwrap_or(edge.epsilon);
        edge.epsilon_limit = status.epsilon_limit.unwrap_or(edge.epsilon_limit);
        edge.delta = status.delta.unwrap_or(edge.delta);
        if let Some(service) = status.services.iter().find(|service| service.name == SERVICE) {
            edge.service.clone_from(&service.state);
            edge.restarts = service.restarts;
            if let Some((score, threshold)) = service.score.zip(service.threshold) {
                if edge.scores.is_empty() {
                    lines.push(format!("{} has learnt what is normal and watches", edge.name));
                }
                edge.scores.push(ScorePoint {
                    at_s,
                    score,
                    threshold,
                });
            }
        }
        member.status = Some(status);
    }

    fn take_incidents(&mut self, index: usize, incidents: Vec<IncidentView>, lines: &mut Vec<String>) {
        let began_unix_ms = self.began_unix_ms;
        let member = &mut self.cast[index];
        let Some(edge) = self.record.edges.get_mut(index) else {
            return;
        };
        for incident in &incidents {
            if member.told.get(&incident.id) != Some(&incident.state) {
                lines.push(tell(&edge.name, incident));
                member.told.insert(incident.id, incident.state.clone());
            }
        }
        edge.actions = incidents
            .iter()
            .filter_map(|incident| {
                let (acted, action) = incident.acted_unix_ms.zip(incident.action.as_ref())?;
                let at_s = (acted as f64 - began_unix_ms as f64) / 1e3;
                Some(ActionMark {
                    at_s,
                    action: words(action),
                    class: words(&incident.class),
                })
            })
            .collect();
        member.incidents = incidents;
    }

    fn take_aggregator(&mut self, status: theriac_aggregator::status::Status, lines: &mut Vec<String>) {
        let at_s = self.now_s();
        self.record.model_version = status.model_version;
        (self.record.bytes_up, self.record.bytes_down) = (status.bytes_up, status.bytes_down);
        for site in status.sites {
            let Some(edge) = self.record.edge_mut(&site.name) else {
                continue;
            };
            edge.updates_accepted = site.accepted;
            edge.updates_refused = site.refused;
            edge.refusals = site.refusals;
            edge.declines = site.declines;
            if edge.budget_spent_s.is_none() && edge.declines.contains_key("budget_spent") {
                edge.budget_spent_s = Some(at_s);
                lines.push(format!(
                    "{} has spent its privacy budget: it stops training and goes on watching",
                    edge.name
                ));
            }
            if edge.hostile
                && !self.refused_seen
                && let Some((reason, _)) = edge.main_refusal()
            {
                lines.push(format!(
                    "the aggregator refused an update of {}: {}",
                    edge.name,
                    words(reason)
                ));
                self.refused_seen = true;
            }
        }
    }

    fn take_rounds(&mut self, rounds: Vec<RoundRow>, lines: &mut Vec<String>) {
        let ended = rounds.into_iter().filter_map(|row| {
            let ended_s = self.since_began(row.ended_unix_ms?);
            let seconds = row
                .opened_unix_ms
                .map_or(0.0, |opened| ended_s - self.since_began(opened));
            Some(RoundRecord {
                round: row.round,
                ended_s,
                seconds,
                published: row.published,
                accepted: row.accepted,
                refused: row.refused,
                declined: row.declined,
            })
        });
        let mut ended: Vec<RoundRecord> = ended.collect();
        ended.sort_by_key(|round| round.round);
        let first = self.record.rounds_published() == 0;
        self.record.rounds = ended;
        if first && let Some(round) = self.record.rounds.iter().find(|round| round.published.is_some()) {
            lines.push(format!("round {} published the first common model", round.round));
        }
    }
}

enum Page {
    Edge(
        usize,
        Result<Status, HttpError>,
        Result<Vec<IncidentView>, HttpError>,
    ),
    Aggregator(
        Result<theriac_aggregator::status::Status, HttpError>,
        Result<Vec<RoundRow>, HttpError>,
    ),
}

/// An incident as a line of the demo.
fn tell(edge: &str, incident: &IncidentView) -> String {
    let who = if incident.service == SERVICE {
        edge.to_owned()
    } else {
        format!("{edge} ({})", incident.service)
    };
    let class = match incident.class.as_str() {
        "unknown" => "something unusual".to_owned(),
        class => words(class),
    };
    let causes = incident
        .causes
        .iter()
        .take(2)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    let causes = if causes.is_empty() {
        String::new()
    } else {
        format!(", led by {causes}")
    };
    match (incident.state.as_str(), &incident.action) {
        ("healed", Some(action)) => format!("{who}: {class} healed by {}", words(action)),
        ("healed" | "recovered", _) => format!("{who}: {class} is over"),
        ("handed_to_human", None) => {
            format!("{who}: {class}{causes}; no action would help, left to a person")
        }
        ("handed_to_human", Some(_)) => format!("{who}: {class} handed to a person"),
        (state, _) => format!("{who}: {class}{causes}, {}", words(state)),
    }
}

/// Nothing more will happen to it.
fn is_closed(incident: &IncidentView) -> bool {
    matches!(incident.state.as_str(), "healed" | "recovered")
}

/// The word that an enumeration has in JSON.
fn enum_word(value: &impl serde::Serialize) -> String {
    let json = serde_json::to_value(value).ok();
    json.as_ref()
        .and_then(serde_json::Value::as_str)
        .map(words)
        .unwrap_or_default()
}

/// The wall clock, milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
