//! A recorded shop of services: files of the `PetShop` kind (Hardt et al., "The `PetShop` Dataset", `CLeaR` 2024).

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use theriac_model::call_graph::CallGraph;
use theriac_model::io::read_npy_f64;

use super::{CausesError, names, read_json};

/// One system: who calls whom, and how it is when nothing is wrong.
#[derive(Debug)]
pub(super) struct System {
    pub(super) name: String,
    pub(super) services: Vec<String>,
    pub(super) graph: CallGraph,
    pub(super) normal: Metrics,
    pub(super) issues: Vec<Issue>,
}

/// Rows of metrics `[time, column]`; a column is (service, metric, statistic).
#[derive(Debug)]
pub(super) struct Metrics {
    columns: BTreeMap<(String, String, String), usize>,
    width: usize,
    values: Vec<f64>,
}

/// What is known of an issue when it is looked into, and the service that was broken, which only the judge sees.
#[derive(Debug)]
pub(super) struct Issue {
    pub(super) name: String,
    pub(super) metrics: Metrics,
    pub(super) alarm: Alarm,
    /// Row nearest to the alarm's time.
    pub(super) alarm_row: usize,
    pub(super) broken: String,
}

/// Where the issue was noticed.
#[derive(Debug, Deserialize)]
pub(super) struct Alarm {
    pub(super) node: String,
    pub(super) metric: String,
    #[serde(rename = "agg")]
    pub(super) statistic: String,
    timestamp: f64,
}

/// The file's `metadata` tells the injected fault in words. It is a label and not even read.
#[derive(Debug, Deserialize)]
struct Target {
    target: Alarm,
    root_cause: RootCause,
}

#[derive(Debug, Deserialize)]
struct RootCause {
    node: String,
}

#[derive(Debug, Deserialize)]
struct GraphFile {
    nodes: Vec<String>,
    edges: Vec<(String, String)>,
}

/// Every system of a folder.
pub(super) fn read(folder: &Path) -> Result<Vec<System>, CausesError> {
    names(folder, ".graph.json")?
        .into_iter()
        .map(|name| System::read(folder, name))
        .collect()
}

impl System {
    fn read(folder: &Path, name: String) -> Result<Self, CausesError> {
        let path = folder.join(format!("{name}.graph.json"));
        let GraphFile { nodes, edges } = read_json(&path)?;
        let wrong = |reason: String| CausesError::Contents {
            path: path.clone(),
            reason,
        };
        let number = |node: &String| {
            let found = nodes.iter().position(|known| known == node);
            found.ok_or_else(|| wrong(format!("an edge names `{node}`, which is no node")))
        };
        let calls: Vec<(usize, usize)> = edges
            .iter()
            .map(|(caller, callee)| Ok((number(caller)?, number(callee)?)))
            .collect::<Result<_, CausesError>>()?;
        let graph = CallGraph::new(nodes.len(), calls).map_err(|error| wrong(error.to_string()))?;
        let normal = Metrics::read(folder, &format!("{name}.noissue"))?;
        let issues = names(folder, ".target.json")?
            .into_iter()
            .filter(|issue| issue.starts_with(&format!("{name}.")))
            .map(|issue| Issue::read(folder, &issue))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            services: nodes,
            graph,
            normal,
            issues,
            name,
        })
    }
}

impl Issue {
    fn read(folder: &Path, name: &str) -> Result<Self, CausesError> {
        let Target { target, root_cause } = read_json(&folder.join(format!("{name}.target.json")))?;
        let metrics = Metrics::read(folder, name)?;
        let path = folder.join(format!("{name}.time.npy.gz"));
        let times = read_npy_f64(&path)?.values;
        let distance = |time: &f64| (time - target.timestamp).abs();
        let nearest = (0..times.len().min(metrics.rows()))
            .min_by(|a, b| distance(&times[*a]).total_cmp(&distance(&times[*b])));
        let alarm_row = nearest.ok_or_else(|| CausesError::Contents {
            path,
            reason: "there is no row".to_owned(),
        })?;
        Ok(Self {
            name: name.to_owned(),
            metrics,
            alarm: target,
            alarm_row,
            broken: root_cause.node,
        })
    }
}

impl Metrics {
    fn read(folder: &Path, name: &str) -> Result<Self, CausesError> {
        let path = folder.join(format!("{name}.value.npy.gz"));
        let array = read_npy_f64(&path)?;
        let path = folder.join(format!("{name}.columns.json"));
        let columns: Vec<(String, String, String)> = read_json(&path)?;
        if array.shape.len() != 2 || array.shape[1] != columns.len() {
            let reason = format!(
                "{} columns, the values have shape {:?}",
                columns.len(),
                array.shape
            );
            return Err(CausesError::Contents { path, reason });
        }
        Ok(Self {
            width: columns.len(),
            columns: columns
                .into_iter()
                .enumerate()
                .map(|(i, column)| (column, i))
                .collect(),
            values: array.values,
        })
    }

    pub(super) fn rows(&self) -> usize {
        self.values.len().checked_div(self.width).unwrap_or(0)
    }

    /// Values of a column, NaN where nothing was reported; `None` when there is no such column.
    pub(super) fn column(&self, service: &str, metric: &str, statistic: &str) -> Option<Vec<f64>> {
        let key = (service.to_owned(), metric.to_owned(), statistic.to_owned());
        let column = *self.columns.get(&key)?;
        Some(
            self.values
                .iter()
                .skip(column)
                .step_by(self.width)
                .copied()
                .collect(),
        )
    }
}
