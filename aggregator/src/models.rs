//! Published models in memory: the one in force as a frame that every session shares.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use theriac_protocol::codec::{CodecError, Encoded, body_bytes_max, encode_to_edge};
use theriac_protocol::frame::kind;
use theriac_protocol::message::{ModelV1, ToEdge};
use theriac_protocol::units::ModelVersion;

use crate::store::models::{self, ModelRow};
use crate::store::{Store, StoreError};

/// Why there is no model to send.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// It is not in the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its header does not encode.
    #[error("the model does not encode: {0}")]
    Codec(#[from] CodecError),
}

/// The model in force, encoded once. A thousand edges that fetch it share its bytes.
#[derive(Debug, Default)]
pub struct Models {
    /// Held for a clone of two reference counts.
    current: Mutex<Option<(ModelVersion, Encoded)>>,
}

impl Models {
    /// Loads a model from the store and makes it the one in force.
    ///
    /// # Errors
    /// [`ModelError`].
    pub async fn load(&self, store: &Store, row: &ModelRow) -> Result<(), ModelError> {
        let (inner, version) = (store.clone(), row.version);
        let payload = store
            .read(move |connection| models::model_payload(connection, inner.blobs(), version))
            .await?;
        self.put(row.version, encode(row, payload)?);
        Ok(())
    }

    /// Makes a model that is durable the one in force.
    pub fn set_current(&self, row: &ModelRow, payload: Bytes) {
        match encode(row, payload) {
            Ok(frame) => self.put(row.version, frame),
            Err(error) => tracing::error!(%error, version = row.version.0, "a model cannot be sent"),
        }
    }

    /// A model as a frame, from memory or from the store.
    ///
    /// # Errors
    /// [`ModelError`].
    pub async fn frame(&self, store: &Store, version: ModelVersion) -> Result<Encoded, ModelError> {
        if let Some(frame) = self.cached(version) {
            return Ok(frame);
        }
        let inner = store.clone();
        let read = move |connection: &rusqlite::Connection| {
            let row = models::model(connection, version)?;
            Ok((models::model_payload(connection, inner.blobs(), version)?, row))
        };
        let (payload, row) = store.read(read).await?;
        encode(&row, payload)
    }

    fn cached(&self, version: ModelVersion) -> Option<Encoded> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current
            .as_ref()
            .filter(|(held, _)| *held == version)
            .map(|(_, frame)| frame.clone())
    }

    fn put(&self, version: ModelVersion, frame: Encoded) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some((version, frame));
    }
}

fn encode(row: &ModelRow, payload: Bytes) -> Result<Encoded, ModelError> {
    let header = ModelV1 {
        version: row.version,
        round: row.round,
        layout_digest: row.layout_digest,
        values: row.values,
        payload_digest: row.digest,
        rule: row.rule.clone(),
        contributors: row.contributors,
    };
    Ok(encode_to_edge(&ToEdge::Model(header, payload))?)
}

/// Longest frame body of an edge in this federation: an update of `values` values, four bytes each at most.
pub fn frame_bytes_max(values: u32) -> u32 {
    body_bytes_max(kind::UPDATE_V1, values.saturating_mul(4)).unwrap_or(u32::MAX)
}
