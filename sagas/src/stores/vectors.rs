//! Qdrant, or the development server behind the same API: one point for each chunk of a version.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use qdrant_client::{
    Qdrant,
    qdrant::{
        Condition, CreateCollectionBuilder, CreateFieldIndexCollectionBuilder, DeletePointsBuilder, Distance,
        FieldType, Filter, GetPointsBuilder, PointId, PointStruct, PointsIdsList, QueryPointsBuilder,
        ScrollPointsBuilder, UpdateMode, UpsertPointsBuilder, VectorParamsBuilder, point_id::PointIdOptions,
        vectors_output::VectorsOptions,
    },
};
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;
use uuid::Uuid;

use super::point_id;
use crate::{
    batch_size::Sizes,
    coalescing::{Batch, Coalescer, Limits},
    error::{Class, Dependency, StoreError},
    kinds::is_collection,
};

/// How to connect.
#[derive(Debug, Clone)]
pub struct VectorsConfig {
    /// gRPC address, from `QDRANT_URL`.
    pub url: String,
    /// API key, from `QDRANT_API_KEY`.
    pub api_key: Option<String>,
    /// No reply within this time is a time-out.
    pub call_timeout: Duration,
}

/// One chunk's point.
#[derive(Debug, Clone)]
pub struct Point {
    /// The version.
    pub version: Uuid,
    /// The chunk's number.
    pub chunk: i32,
    /// The document.
    pub document_id: Uuid,
    /// Owner.
    pub tenant: String,
    /// The ledger that knows the version: others may keep points in the same collection.
    pub ledger: Uuid,
    /// Unit-length vector.
    pub vector: Vec<f32>,
}

/// A point as it is stored.
#[derive(Debug, Clone)]
pub struct StoredPoint {
    /// Its id.
    pub id: Uuid,
    /// The version in its payload.
    pub version: Option<Uuid>,
    /// The chunk number in its payload.
    pub chunk: Option<i32>,
    /// The document in its payload.
    pub document: Option<Uuid>,
    /// The tenant in its payload.
    pub tenant: Option<String>,
    /// The ledger in its payload: points of others, and those of before there was such a stamp, have none.
    pub ledger: Option<Uuid>,
    /// Its vector, where asked for.
    pub vector: Option<Vec<f32>>,
}

/// Where the next page of a scroll begins.
#[derive(Debug, Clone)]
pub struct ScrollOffset(PointId);

/// A page of a collection.
#[derive(Debug, Clone, Default)]
pub struct ScrollPage {
    /// Points whose ids are UUIDs, as all of Flotilla's are.
    pub points: Vec<StoredPoint>,
    /// `None`: this was the last page.
    pub next: Option<ScrollOffset>,
}

/// A search hit before Postgres has said whether readers may see it.
#[derive(Debug, Clone)]
pub struct Hit {
    /// The version.
    pub version: Uuid,
    /// The chunk.
    pub chunk: i32,
    /// Dot product of unit vectors: the cosine, -1 to 1.
    pub score: f32,
}

/// SHA-256 over chunk numbers and vectors (little-endian f32), in chunk order.
pub fn vectors_hash<'a>(vectors: impl Iterator<Item = &'a [f32]>) -> Vec<u8> {
    let mut hash = Sha256::new();
    for (no, vector) in vectors.enumerate() {
        hash.update((no as u32).to_le_bytes());
        for value in vector {
            hash.update(value.to_le_bytes());
        }
    }
    hash.finalize().to_vec()
}

/// The handle; clones share channels and coalescers.
#[derive(Clone)]
pub struct Vectors {
    client: Arc<Qdrant>,
    probe: Arc<Qdrant>,
    /// Collections known to exist, each with its coalescer.
    collections: Arc<Mutex<HashMap<String, Coalescer<UpsertBatch>>>>,
}

struct UpsertBatch {
    client: Arc<Qdrant>,
    collection: String,
}

#[async_trait]
impl Batch for UpsertBatch {
    type Item = Arc<Vec<Point>>;
    type Reply = ();
    const OP: &'static str = "upsert";
    const DEPENDENCY: Dependency = Dependency::Vectors;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<()>, StoreError> {
        let points: Vec<PointStruct> =
            items.iter().flat_map(|points| points.iter().map(point_struct)).collect();
        self.client
            .upsert_points(
                UpsertPointsBuilder::new(&self.collection, points)
                    .wait(true)
                    .update_mode(UpdateMode::InsertOnly),
            )
            .await?;
        Ok(vec![(); items.len()])
    }
}

/// A version's points that are to go.
#[derive(Clone)]
struct Withdrawn {
    collection: String,
    version: Uuid,
    chunks: i32,
}

struct WithdrawBatch(Vectors);

/// Coalesced [`Vectors::remove`]; clones share the coalescer.
#[derive(Clone)]
pub struct Withdrawals(Coalescer<WithdrawBatch>);

impl Withdrawals {
    /// Removes a version's points; fine when they, or the collection, are not there.
    pub async fn remove(
        &self,
        collection: &str,
        version: Uuid,
        chunks: i32,
        deadline: tokio::time::Instant,
    ) -> Result<(), StoreError> {
        let item = Withdrawn { collection: collection.to_owned(), version, chunks };
        self.0.call(item, deadline).await?
    }
}

#[async_trait]
impl Batch for WithdrawBatch {
    type Item = Withdrawn;
    /// What the item's collection answered: that of a neighbour may be another.
    type Reply = Result<(), StoreError>;
    const OP: &'static str = "withdraw";
    const DEPENDENCY: Dependency = Dependency::Vectors;

    async fn flush(&self, items: &[Withdrawn]) -> Result<Vec<Self::Reply>, StoreError> {
        let mut versions: BTreeMap<&str, Vec<(Uuid, i32)>> = BTreeMap::new();
        for item in items {
            versions.entry(&item.collection).or_default().push((item.version, item.chunks));
        }
        let mut answers = BTreeMap::new();
        for (collection, versions) in versions {
            answers.insert(collection, self.0.remove(collection, &versions).await);
        }
        Ok(items.iter().map(|item| answers[item.collection.as_str()].clone()).collect())
    }
}

fn point_struct(point: &Point) -> PointStruct {
    PointStruct::new(
        PointId::from(point_id(point.version, point.chunk).to_string()),
        point.vector.clone(),
        [
            ("tenant", qdrant_client::qdrant::Value::from(point.tenant.clone())),
            ("document", point.document_id.to_string().into()),
            ("version", point.version.to_string().into()),
            ("chunk", i64::from(point.chunk).into()),
            ("ledger", point.ledger.to_string().into()),
        ],
    )
}

fn ids(points: impl Iterator<Item = Uuid>) -> Vec<PointId> {
    points.map(|id| PointId::from(id.to_string())).collect()
}

/// Points in one request: keeps a message well below gRPC's 4 MiB also with 1,536 dimensions.
const PAGE: usize = 256;

impl Vectors {
    /// Makes the handle; connects on first use.
    pub fn lazy(config: &VectorsConfig) -> Result<Self, StoreError> {
        let build = |timeout: Duration| {
            let mut builder = Qdrant::from_url(&config.url)
                .timeout(timeout)
                .connect_timeout(timeout)
                .keep_alive_while_idle()
                .skip_compatibility_check();
            if let Some(key) = &config.api_key {
                builder = builder.api_key(key.as_str());
            }
            builder.build().map_err(|e| {
                StoreError::new(
                    Dependency::Vectors,
                    Class::Permanent,
                    format!("QDRANT_URL can't be read: {e}"),
                )
            })
        };
        Ok(Self {
            client: Arc::new(build(config.call_timeout)?),
            probe: Arc::new(build(Duration::from_secs(1))?),
            collections: Arc::default(),
        })
    }

    /// Starts the coalescer of the removals that compensations ask for.
    pub fn withdrawals(&self) -> Withdrawals {
        Withdrawals(Coalescer::spawn(WithdrawBatch(self.clone()), Limits::default()))
    }

    /// Whether the server answers within a second.
    pub async fn probe(&self) -> Result<(), StoreError> {
        match tokio::time::timeout(Duration::from_secs(1), self.probe.health_check()).await {
            Ok(result) => {
                result?;
                Ok(())
            }
            Err(_) => Err(StoreError::new(Dependency::Vectors, Class::Unavailable, "no answer within 1 s")),
        }
    }

    /// The collection's coalescer; makes the collection, with its payload indexes, when it isn't there. Refuses one of
    /// another vector length.
    async fn collection(&self, name: &str, dimensions: usize) -> Result<Coalescer<UpsertBatch>, StoreError> {
        let mut known = self.collections.lock().await;
        if let Some(coalescer) = known.get(name) {
            return Ok(coalescer.clone());
        }
        self.ensure(name, dimensions).await?;
        let batch = UpsertBatch { client: Arc::clone(&self.client), collection: name.to_owned() };
        // An item is up to a page of points.
        let items = Sizes { first: 64, most: 64, ..Sizes::default() };
        let coalescer = Coalescer::spawn(batch, Limits { items, ..Limits::default() });
        known.insert(name.to_owned(), coalescer.clone());
        Ok(coalescer)
    }

    /// Makes the collection and its payload indexes where they are missing. Indexes come before the points: a filter
    /// without one reads every point.
    pub async fn ensure(&self, name: &str, dimensions: usize) -> Result<(), StoreError> {
        if !self.client.collection_exists(name).await? {
            // Dot over unit vectors is the cosine, and stores them unchanged to the bit, which the auditor compares.
            let create = CreateCollectionBuilder::new(name)
                .vectors_config(VectorParamsBuilder::new(dimensions as u64, Distance::Dot));
            match self.client.create_collection(create).await {
                Ok(_) => {}
                // 6: AlreadyExists; another worker was first.
                Err(qdrant_client::QdrantError::ResponseError { status })
                    if i32::from(status.code()) == 6 => {}
                Err(error) => return Err(error.into()),
            }
        }
        for field in ["tenant", "document", "version"] {
            self.client
                .create_field_index(
                    CreateFieldIndexCollectionBuilder::new(name, field, FieldType::Keyword).wait(true),
                )
                .await?;
        }
        let info = self.client.collection_info(name).await?;
        let size = info
            .result
            .and_then(|i| i.config)
            .and_then(|c| c.params)
            .and_then(|p| p.vectors_config)
            .and_then(|v| v.config)
            .and_then(|c| match c {
                qdrant_client::qdrant::vectors_config::Config::Params(p) => Some(p.size),
                qdrant_client::qdrant::vectors_config::Config::ParamsMap(_) => None,
            });
        if size != Some(dimensions as u64) {
            return Err(StoreError::new(
                Dependency::Vectors,
                Class::Permanent,
                format!(
                    "collection {name} has vectors of {} dimensions and the model gives {dimensions}: use another collection",
                    size.map_or_else(|| "several".to_owned(), |s| s.to_string())
                ),
            ));
        }
        Ok(())
    }

    /// Inserts points that are not there; those that are stay as they are (PROTOCOL.md 6).
    pub async fn insert(
        &self,
        collection: &str,
        dimensions: usize,
        points: Vec<Point>,
        deadline: tokio::time::Instant,
    ) -> Result<(), StoreError> {
        let coalescer = tokio::time::timeout_at(deadline, self.collection(collection, dimensions))
            .await
            .map_err(|_| {
            StoreError::new(Dependency::Vectors, Class::Timeout, "the collection was not ready in time")
        })??;
        for (no, page) in points.chunks(crate::fault::page(PAGE)).enumerate() {
            if no > 0 {
                crate::fault_point!("ingest.vectors.inside");
            }
            if let Err(error) = coalescer.call(Arc::new(page.to_vec()), deadline).await {
                return Err(self.unless_dropped(collection, error).await);
            }
        }
        Ok(())
    }

    /// Writes points over what stands under their ids, for repairs of a published version: the vectors must be those that were
    /// published. Nothing is missing meanwhile, and whoever writes the version late inserts only. A version that is retired
    /// meanwhile still has its last sweep before it.
    pub async fn overwrite(
        &self,
        collection: &str,
        dimensions: usize,
        points: &[Point],
    ) -> Result<(), StoreError> {
        self.collection(collection, dimensions).await?;
        for page in points.chunks(PAGE) {
            let points: Vec<PointStruct> = page.iter().map(point_struct).collect();
            if let Err(error) =
                self.client.upsert_points(UpsertPointsBuilder::new(collection, points).wait(true)).await
            {
                return Err(self.unless_dropped(collection, error.into()).await);
            }
        }
        Ok(())
    }

    /// The error of a write; when somebody has dropped the collection, the next call makes it again.
    async fn unless_dropped(&self, collection: &str, error: StoreError) -> StoreError {
        if !error.message.contains("doesn't exist") {
            return error;
        }
        self.collections.lock().await.remove(collection);
        StoreError { class: Class::Transient, ..error }
    }

    /// The stored points of a version, by their ids; absent ones are left out.
    pub async fn points(
        &self,
        collection: &str,
        version: Uuid,
        chunks: i32,
    ) -> Result<Vec<StoredPoint>, StoreError> {
        let all: Vec<Uuid> = (0..chunks).map(|no| point_id(version, no)).collect();
        self.points_by_id(collection, &all, true).await
    }

    /// Stored points by id; absent ones are left out.
    pub async fn points_by_id(
        &self,
        collection: &str,
        all: &[Uuid],
        vectors: bool,
    ) -> Result<Vec<StoredPoint>, StoreError> {
        let mut found = Vec::with_capacity(all.len());
        for page in all.chunks(PAGE) {
            let answer = self
                .client
                .get_points(
                    GetPointsBuilder::new(collection, ids(page.iter().copied()))
                        .with_payload(true)
                        .with_vectors(vectors),
                )
                .await;
            match answer {
                Ok(answer) => found.extend(
                    answer
                        .result
                        .into_iter()
                        .filter_map(|p| stored(p.id, &p.payload, p.vectors.and_then(|v| v.vectors_options))),
                ),
                Err(error) if is_missing(&error) => return Ok(vec![]),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(found)
    }

    /// Removes a version's points; fine when they, or the collection, are not there. A collection can't have a name that is not
    /// allowed.
    pub async fn remove(&self, collection: &str, versions: &[(Uuid, i32)]) -> Result<(), StoreError> {
        if !is_collection(collection) {
            return Ok(());
        }
        let all: Vec<Uuid> = versions
            .iter()
            .flat_map(|(version, chunks)| (0..*chunks).map(|no| point_id(*version, no)))
            .collect();
        self.remove_ids(collection, &all).await
    }

    /// Removes points by id; fine when they, or the collection, are not there.
    pub async fn remove_ids(&self, collection: &str, all: &[Uuid]) -> Result<(), StoreError> {
        // Removals are cheap messages: 16 bytes a point.
        for page in all.chunks(PAGE * 16) {
            let list = PointsIdsList { ids: ids(page.iter().copied()) };
            match self
                .client
                .delete_points(DeletePointsBuilder::new(collection).points(list).wait(true))
                .await
            {
                Err(error) if !is_missing(&error) => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }

    /// The `limit` nearest points of a tenant after `offset`, best first, whether published or not.
    pub async fn nearest(
        &self,
        collection: &str,
        tenant: &str,
        vector: Vec<f32>,
        limit: u64,
        offset: u64,
    ) -> Result<Vec<Hit>, StoreError> {
        let query = QueryPointsBuilder::new(collection)
            .query(vector)
            .filter(Filter::must([Condition::matches("tenant", tenant.to_owned())]))
            .limit(limit)
            .offset(offset)
            .with_payload(true);
        let answer = match self.client.query(query).await {
            Ok(answer) => answer,
            Err(error) if is_missing(&error) => return Ok(vec![]),
            Err(error) => return Err(error.into()),
        };
        Ok(answer
            .result
            .into_iter()
            .filter_map(|p| {
                let point = stored(p.id, &p.payload, None)?;
                Some(Hit { version: point.version?, chunk: point.chunk?, score: p.score })
            })
            .collect())
    }

    /// A page of all points of a collection from `offset` on, without vectors, for the auditor. A collection that isn't
    /// there has none.
    pub async fn scroll(
        &self,
        collection: &str,
        offset: Option<ScrollOffset>,
        limit: u32,
    ) -> Result<ScrollPage, StoreError> {
        let mut request =
            ScrollPointsBuilder::new(collection).limit(limit).with_payload(true).with_vectors(false);
        if let Some(ScrollOffset(offset)) = offset {
            request = request.offset(offset);
        }
        let answer = match self.client.scroll(request).await {
            Ok(answer) => answer,
            Err(error) if is_missing(&error) => return Ok(ScrollPage::default()),
            Err(error) => return Err(error.into()),
        };
        Ok(ScrollPage {
            points: answer.result.into_iter().filter_map(|p| stored(p.id, &p.payload, None)).collect(),
            next: answer.next_page_offset.map(ScrollOffset),
        })
    }

    /// The names of all collections.
    pub async fn collections(&self) -> Result<HashSet<String>, StoreError> {
        Ok(self.client.list_collections().await?.collections.into_iter().map(|c| c.name).collect())
    }
}

fn is_missing(error: &qdrant_client::QdrantError) -> bool {
    // 5: NotFound
    matches!(error, qdrant_client::QdrantError::ResponseError { status } if i32::from(status.code()) == 5)
}

fn uuid_of(id: PointId) -> Option<Uuid> {
    match id.point_id_options? {
        PointIdOptions::Uuid(text) => text.parse().ok(),
        PointIdOptions::Num(_) => None,
    }
}

fn stored(
    id: Option<PointId>,
    payload: &HashMap<String, qdrant_client::qdrant::Value>,
    vectors: Option<VectorsOptions>,
) -> Option<StoredPoint> {
    let text = |key: &str| payload.get(key).and_then(|v| v.as_str()).map(ToString::to_string);
    Some(StoredPoint {
        id: uuid_of(id?)?,
        version: text("version").and_then(|v| v.parse().ok()),
        document: text("document").and_then(|v| v.parse().ok()),
        chunk: payload
            .get("chunk")
            .and_then(qdrant_client::qdrant::Value::as_integer)
            .and_then(|n| i32::try_from(n).ok()),
        tenant: text("tenant"),
        ledger: text("ledger").and_then(|v| v.parse().ok()),
        vector: vectors.and_then(|v| match v {
            VectorsOptions::Vector(vector) => match vector.into_vector() {
                qdrant_client::qdrant::vector_output::Vector::Dense(dense) => Some(dense.data),
                _ => None,
            },
            VectorsOptions::Vectors(_) => None,
        }),
    })
}
