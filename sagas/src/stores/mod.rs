//! The three stores. All SQL of the project is in `postgres/`, all use of Qdrant in `vectors`, all use of the cache
//! Redis in `cache`.

pub mod announcer;
pub mod cache;
mod cache_line;
pub mod postgres;
pub mod vectors;

use uuid::Uuid;

/// Namespace of point ids: a fixed random UUID, part of the stored data's format.
const POINTS: Uuid = Uuid::from_u128(0x5b0c_a1f2_7c3e_4d6b_9a57_41e2_f00d_c0de);

/// The id of a chunk's point: derived from the version and the chunk's number alone (PROTOCOL.md 6), so that every
/// delivery of a run writes the same points and no other run does.
pub fn point_id(version: Uuid, chunk: i32) -> Uuid {
    let mut name = [0u8; 20];
    name[..16].copy_from_slice(version.as_bytes());
    name[16..].copy_from_slice(&chunk.to_be_bytes());
    Uuid::new_v5(&POINTS, &name)
}
