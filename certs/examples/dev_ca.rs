//! A throw-away federation for a laptop: two authorities, one aggregator, a few edges, in one directory.
//!
//! ```text
//! cargo run -p theriac-certs --example dev_ca -- DIR [EDGES]
//! ```
//!
//! Nothing of it belongs into a repository or onto a real network.

use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::time::SystemTime;

use theriac_certs::{Authority, Role};
use theriac_protocol::units::NodeId;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = PathBuf::from(arguments.next().ok_or("say where to: dev_ca DIR [EDGES]")?);
    let edges: u32 = arguments.next().map_or(Ok(3), |count| count.parse())?;

    let now = SystemTime::now();
    let aggregator_authority = Authority::generate("laptop", Role::Aggregator, now)?;
    let edge_authority = Authority::generate("laptop", Role::Edge, now)?;
    aggregator_authority.save(&dir.join("authority/aggregators"))?;
    edge_authority.save(&dir.join("authority/edges"))?;

    let hosts = ["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    aggregator_authority
        .issue_aggregator(&NodeId::new("main")?, &hosts)?
        .save(&dir.join("identity"), "identity")?;
    for number in 1..=edges {
        let node = NodeId::new(format!("edge-{number}"))?;
        edge_authority
            .issue_edge(&node)?
            .save(&dir.join("edges"), node.as_str())?;
    }
    writeln!(
        std::io::stdout(),
        "an aggregator and {edges} edges are in {}",
        dir.display()
    )?;
    Ok(())
}
