//! Services of a recorded shop: at which place of the ranking the broken service stands.

use std::path::Path;

use serde::Serialize;
use theriac_command::output::table;
use theriac_model::call_graph::excess;

use super::CausesError;
use super::shop::{Issue, Metrics, System, read};

/// Places that are averaged: Avg@5 is the mean of top-1 to top-5.
const PLACES: usize = 5;
/// Share of the callee's deviation that the reference ranking takes off.
const REFERENCE_DAMPING: f64 = 0.8;

/// A way to rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Ranking {
    /// Deviation in interquartile ranges, every service.
    Deviation,
    /// The same, only services that the alarmed one calls.
    DeviationReachable,
    /// The same, less 0.8 of the largest deviation among the callees: the best reference.
    DeviationLessCallee,
    /// What ships: own part of the excess (`theriac_model::call_graph`).
    Excess,
}

impl Ranking {
    const ALL: [Self; 4] = [
        Self::Deviation,
        Self::DeviationReachable,
        Self::DeviationLessCallee,
        Self::Excess,
    ];

    fn words(self) -> &'static str {
        match self {
            Self::Deviation => "deviation, all",
            Self::DeviationReachable => "deviation, reachable",
            Self::DeviationLessCallee => "deviation − 0.8 callee",
            Self::Excess => "own excess (ships)",
        }
    }
}

/// Rows that are looked at: so many before and after the row nearest to the alarm, moved by `shift`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Window {
    before: usize,
    after: usize,
    shift: i64,
}

const WINDOW: Window = Window {
    before: 1,
    after: 1,
    shift: 0,
};

/// Other windows, to see how much hangs on the right time.
const OTHER_WINDOWS: [Window; 4] = [
    Window {
        before: 0,
        after: 0,
        shift: 0,
    },
    Window {
        before: 2,
        after: 2,
        shift: 0,
    },
    Window {
        before: 1,
        after: 1,
        shift: -1,
    },
    Window {
        before: 1,
        after: 1,
        shift: 1,
    },
];

/// The result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ServiceResult {
    /// Each system and alarmed metric, each ranking; and all issues of a system.
    scenarios: Vec<Places>,
    /// What ships, with other windows than the given one.
    windows: Vec<Places>,
    /// Each issue with the first three services of what ships.
    issues: Vec<IssueResult>,
}

/// Places of the broken service over some issues.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Places {
    system: String,
    /// The alarmed metric, or `all`.
    scenario: String,
    ranking: Ranking,
    window: Window,
    issues: usize,
    top_1: f64,
    top_3: f64,
    top_5: f64,
    avg_5: f64,
}

/// One issue.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct IssueResult {
    issue: String,
    broken: String,
    /// Place of the broken service from 1; `None` when it is not in the ranking.
    place: Option<usize>,
    first: Vec<String>,
}

pub(super) fn measure(folder: &Path) -> Result<ServiceResult, CausesError> {
    let systems = read(folder)?;
    if systems.iter().all(|system| system.issues.is_empty()) {
        return Err(CausesError::Nothing {
            path: folder.to_owned(),
            wanted: "SYSTEM.graph.json with SYSTEM.*.target.json",
        });
    }
    let mut result = ServiceResult {
        scenarios: Vec::new(),
        windows: Vec::new(),
        issues: Vec::new(),
    };
    for system in &systems {
        let mut metrics: Vec<&str> = system
            .issues
            .iter()
            .map(|issue| issue.alarm.metric.as_str())
            .collect();
        metrics.sort_unstable();
        metrics.dedup();
        for scenario in metrics.into_iter().chain(["all"]) {
            for ranking in Ranking::ALL {
                result.scenarios.push(system.places(scenario, ranking, WINDOW));
            }
        }
        for window in OTHER_WINDOWS {
            result.windows.push(system.places("all", Ranking::Excess, window));
        }
        result.issues.extend(system.issues.iter().map(|issue| {
            let ranked = system.rank(issue, Ranking::Excess, WINDOW);
            IssueResult {
                issue: issue.name.clone(),
                broken: issue.broken.clone(),
                place: place(system, &ranked, issue),
                first: ranked
                    .iter()
                    .take(3)
                    .map(|s| system.services[*s].clone())
                    .collect(),
            }
        }));
    }
    Ok(result)
}

impl System {
    fn places(&self, scenario: &str, ranking: Ranking, window: Window) -> Places {
        let places: Vec<Option<usize>> = self
            .issues
            .iter()
            .filter(|issue| scenario == "all" || issue.alarm.metric == scenario)
            .map(|issue| place(self, &self.rank(issue, ranking, window), issue))
            .collect();
        let issues = places.len();
        let top = |k: usize| {
            places
                .iter()
                .filter(|place| place.is_some_and(|place| place <= k))
                .count() as f64
                / issues as f64
        };
        Places {
            system: self.name.clone(),
            scenario: scenario.to_owned(),
            ranking,
            window,
            issues,
            top_1: top(1),
            top_3: top(3),
            top_5: top(5),
            avg_5: (1..=PLACES).map(top).sum::<f64>() / PLACES as f64,
        }
    }

    /// Services, most suspected first.
    fn rank(&self, issue: &Issue, ranking: Ranking, window: Window) -> Vec<usize> {
        let Some(alarmed) = self
            .services
            .iter()
            .position(|service| *service == issue.alarm.node)
        else {
            return Vec::new();
        };
        let rows = window.rows(issue);
        if ranking == Ranking::Excess {
            let excesses: Vec<f64> = self
                .services
                .iter()
                .map(|service| service_excess(service, issue, &self.normal, &rows).unwrap_or(0.0))
                .collect();
            return self
                .graph
                .rank(alarmed, &excesses)
                .into_iter()
                .map(|ranked| ranked.service)
                .collect();
        }
        let deviations: Vec<Option<f64>> = self
            .services
            .iter()
            .map(|service| deviation(service, issue, &self.normal, &rows))
            .collect();
        let reachable = self.graph.reachable(alarmed);
        let value = |service: usize| {
            let own = deviations[service]?;
            let callees = self
                .graph
                .callees(service)
                .iter()
                .filter_map(|callee| deviations[*callee]);
            let passed_on = callees.fold(0.0, f64::max);
            match ranking {
                Ranking::DeviationLessCallee => Some(own - REFERENCE_DAMPING * passed_on),
                _ => Some(own),
            }
        };
        let mut ranked: Vec<(usize, f64)> = (0..self.services.len())
            .filter(|service| ranking == Ranking::Deviation || reachable[*service])
            .filter_map(|service| Some((service, value(service)?)))
            .collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
        ranked.into_iter().map(|(service, _)| service).collect()
    }
}

impl Window {
    fn rows(self, issue: &Issue) -> std::ops::Range<usize> {
        let last = issue.metrics.rows() - 1;
        let at = issue
            .alarm_row
            .saturating_add_signed(self.shift.try_into().unwrap_or(0))
            .min(last);
        at.saturating_sub(self.before)..(at + self.after).min(last) + 1
    }
}

fn place(system: &System, ranked: &[usize], issue: &Issue) -> Option<usize> {
    let found = ranked
        .iter()
        .position(|service| system.services[*service] == issue.broken);
    found.map(|index| index + 1)
}

/// Excess over the rows: seconds lost by latency, or requests failed.
fn service_excess(
    service: &str,
    issue: &Issue,
    normal: &Metrics,
    rows: &std::ops::Range<usize>,
) -> Option<f64> {
    let cost = |metrics: &Metrics| {
        let statistic = "Average";
        if issue.alarm.metric == "availability" {
            let available = metrics.column(service, "availability", statistic)?;
            Some(
                available
                    .into_iter()
                    .map(|percent| 1.0 - percent / 100.0)
                    .collect::<Vec<_>>(),
            )
        } else {
            metrics.column(service, "latency", statistic)
        }
    };
    let usual = median(&mut present(&cost(normal)?))?;
    let requests = issue.metrics.column(service, "requests", "Sum")?;
    let now = cost(&issue.metrics)?;
    Some(
        rows.clone()
            .map(|row| excess(requests[row], now[row], usual))
            .sum(),
    )
}

/// Largest distance from the normal median in interquartile ranges, of the alarmed metric.
fn deviation(service: &str, issue: &Issue, normal: &Metrics, rows: &std::ops::Range<usize>) -> Option<f64> {
    let (metric, statistic) = (&issue.alarm.metric, &issue.alarm.statistic);
    let mut usual = present(&normal.column(service, metric, statistic)?);
    let now = issue.metrics.column(service, metric, statistic)?;
    let Some(middle) = median(&mut usual) else {
        return Some(0.0);
    };
    let spread = quantile(&usual, 0.75) - quantile(&usual, 0.25);
    let unit = spread.max(1e-3 * middle.abs() + 1e-9);
    let distances = now[rows.clone()]
        .iter()
        .map(|value| (value - middle).abs() / unit);
    Some(
        distances
            .filter(|distance| distance.is_finite())
            .fold(0.0, f64::max),
    )
}

fn present(values: &[f64]) -> Vec<f64> {
    values.iter().copied().filter(|value| value.is_finite()).collect()
}

/// Sorts; `None` for no values.
fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    (!values.is_empty()).then(|| quantile(values, 0.5))
}

/// Interpolates linearly between ascending values, at least one.
fn quantile(ascending: &[f64], q: f64) -> f64 {
    let position = q * (ascending.len() - 1) as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the last index"
    )]
    let below = position.floor() as usize;
    let above = (below + 1).min(ascending.len() - 1);
    ascending[below] + (position - below as f64) * (ascending[above] - ascending[below])
}

impl ServiceResult {
    pub(super) fn table(&self) -> String {
        let numbers = |places: &Places| {
            [places.top_1, places.top_3, places.top_5, places.avg_5].map(|share| format!("{share:.2}"))
        };
        let scenarios = self.scenarios.iter().map(|places| {
            let words = [
                places.system.clone(),
                places.scenario.clone(),
                places.issues.to_string(),
                places.ranking.words().to_owned(),
            ];
            words.into_iter().chain(numbers(places)).collect()
        });
        let windows = self.windows.iter().map(|places| {
            let Window { before, after, shift } = places.window;
            let words = [
                places.system.clone(),
                format!("{before}+1+{after} rows, moved by {shift}"),
            ];
            words.into_iter().chain(numbers(places)).collect()
        });
        let missed = self
            .issues
            .iter()
            .filter(|issue| issue.place != Some(1))
            .map(|issue| {
                let place = issue
                    .place
                    .map_or("not ranked".to_owned(), |place| place.to_string());
                vec![
                    issue.issue.clone(),
                    issue.broken.clone(),
                    place,
                    issue.first.join(", "),
                ]
            });
        let mut parts = vec![
            table(
                &[
                    "system",
                    "alarmed metric",
                    "issues",
                    "ranking",
                    "top-1",
                    "top-3",
                    "top-5",
                    "Avg@5",
                ],
                &scenarios.collect::<Vec<_>>(),
            ),
            table(
                &[
                    "system",
                    "window of what ships",
                    "top-1",
                    "top-3",
                    "top-5",
                    "Avg@5",
                ],
                &windows.collect::<Vec<_>>(),
            ),
        ];
        let missed: Vec<_> = missed.collect();
        if !missed.is_empty() {
            parts.push(table(&["not first", "broken", "place", "ranked first"], &missed));
        }
        parts.join("\n\n")
    }
}
