//! `qdrant.Points`: writes, and reads by id, by scrolling and by counting. Queries are in `queries`.
//!
//! Two fields are taken and need nothing done. `wait = false` is served as `wait = true`, which promises more: when
//! the answer arrives the write is in the log and visible. And on a single node that applies the writes of a
//! collection one after another, every `ordering` and every `read_consistency` holds.

use edge::{FieldIndexOperations, PayloadOps, PointOperations, UpdateOperation};
use pb::points_server::Points;
use qdrant_client::qdrant as pb;
use qdrant_edge as edge;
use tonic::{Request, Response, Status};

use super::{Service, queries};
use crate::convert::filters::{filter_in, optional_in};
use crate::convert::ids::{Selection, id_in, id_out, ids_in, selection_in};
use crate::convert::indexes::schema_in;
use crate::convert::payload::{path_in, payload_in, with_payload_in};
use crate::convert::queries::{limit_in, order_by_in};
use crate::convert::vectors::{point_in, record_out, with_vectors_in};
use crate::status::{Answer, from_engine, invalid};
use crate::store::Collection;
use crate::unsupported::{absent, unsupported_methods};

type Reply<T> = Result<Response<T>, Status>;

impl Service {
    /// Builds an operation for the collection, which must also check it, and applies it.
    async fn write(
        &self,
        collection_name: String,
        timeout: Option<u64>,
        operation: impl FnOnce(&Collection) -> Answer<UpdateOperation> + Send + 'static,
    ) -> Reply<pb::PointsOperationResponse> {
        let write = move |store: &crate::store::Store| {
            let collection = store.get(&collection_name)?;
            collection.update(operation(&collection)?)
        };
        let ((), time) = self.run(timeout, write).await?;
        // The engine keeps its operation numbers to itself.
        let result = pb::UpdateResult { operation_id: None, status: pb::UpdateStatus::Completed as i32 };
        Ok(Response::new(pb::PointsOperationResponse { result: Some(result), time, usage: None }))
    }

    async fn read<T: Send + 'static>(
        &self,
        collection_name: String,
        timeout: Option<u64>,
        read: impl FnOnce(&Collection) -> Answer<T> + Send + 'static,
    ) -> Answer<(T, f64)> {
        self.run(timeout, move |store| read(&*store.get(&collection_name)?)).await
    }

    async fn change_payload(
        &self,
        request: pb::SetPayloadPoints,
        change: fn(edge::SetPayloadOp) -> PayloadOps,
    ) -> Reply<pb::PointsOperationResponse> {
        let pb::SetPayloadPoints {
            collection_name,
            wait: _,
            payload,
            points_selector,
            ordering: _,
            shard_key_selector,
            key,
            timeout,
        } = request;
        absent("SetPayloadPoints.shard_key_selector", &shard_key_selector)?;
        self.write(collection_name, timeout, move |_| {
            let selection = selection_in("points_selector", points_selector)?;
            let (points, filter) = selection.into_options();
            let payload = payload_in(payload)?;
            let key = key.as_deref().map(path_in).transpose()?;
            Ok(UpdateOperation::PayloadOperation(change(edge::SetPayloadOp { payload, points, filter, key })))
        })
        .await
    }
}

/// The engine's form of an upsert. A filter or a mode makes it conditional on the points that exist.
fn upsert_operation(
    points: Vec<edge::PointStructPersisted>,
    update_filter: Option<pb::Filter>,
    update_mode: Option<i32>,
) -> Answer<PointOperations> {
    let update_mode = match update_mode.map(pb::UpdateMode::try_from) {
        None => None,
        Some(Ok(pb::UpdateMode::Upsert)) => Some(edge::UpdateMode::Upsert),
        Some(Ok(pb::UpdateMode::InsertOnly)) => Some(edge::UpdateMode::InsertOnly),
        Some(Ok(pb::UpdateMode::UpdateOnly)) => Some(edge::UpdateMode::UpdateOnly),
        Some(Err(error)) => return Err(invalid(format!("`update_mode`: {error}"))),
    };
    let points_op = edge::PointInsertOperations::PointsList(points);
    if update_filter.is_none() && matches!(update_mode, None | Some(edge::UpdateMode::Upsert)) {
        return Ok(PointOperations::UpsertPoints(points_op));
    }
    let condition = filter_in(update_filter.unwrap_or_default())?;
    Ok(PointOperations::UpsertPointsConditional(edge::ConditionalInsertOperation {
        points_op,
        condition,
        update_mode,
    }))
}

#[tonic::async_trait]
impl Points for Service {
    async fn upsert(&self, request: Request<pb::UpsertPoints>) -> Reply<pb::PointsOperationResponse> {
        let pb::UpsertPoints {
            collection_name,
            wait: _,
            points,
            ordering: _,
            shard_key_selector,
            update_filter,
            timeout,
            update_mode,
        } = request.into_inner();
        absent("UpsertPoints.shard_key_selector", &shard_key_selector)?;
        self.write(collection_name, timeout, move |collection| {
            let points = points.into_iter().map(point_in).collect::<Answer<Vec<_>>>()?;
            collection.shape().check_points(&points)?;
            upsert_operation(points, update_filter, update_mode).map(UpdateOperation::PointOperation)
        })
        .await
    }

    async fn delete(&self, request: Request<pb::DeletePoints>) -> Reply<pb::PointsOperationResponse> {
        let pb::DeletePoints { collection_name, wait: _, points, ordering: _, shard_key_selector, timeout } =
            request.into_inner();
        absent("DeletePoints.shard_key_selector", &shard_key_selector)?;
        self.write(collection_name, timeout, move |_| {
            Ok(UpdateOperation::PointOperation(match selection_in("points", points)? {
                Selection::Ids(ids) => PointOperations::DeletePoints { ids },
                Selection::Filter(filter) => PointOperations::DeletePointsByFilter(filter),
            }))
        })
        .await
    }

    async fn set_payload(
        &self,
        request: Request<pb::SetPayloadPoints>,
    ) -> Reply<pb::PointsOperationResponse> {
        self.change_payload(request.into_inner(), PayloadOps::SetPayload).await
    }

    async fn overwrite_payload(
        &self,
        request: Request<pb::SetPayloadPoints>,
    ) -> Reply<pb::PointsOperationResponse> {
        self.change_payload(request.into_inner(), PayloadOps::OverwritePayload).await
    }

    async fn delete_payload(
        &self,
        request: Request<pb::DeletePayloadPoints>,
    ) -> Reply<pb::PointsOperationResponse> {
        let pb::DeletePayloadPoints {
            collection_name,
            wait: _,
            keys,
            points_selector,
            ordering: _,
            shard_key_selector,
            timeout,
        } = request.into_inner();
        absent("DeletePayloadPoints.shard_key_selector", &shard_key_selector)?;
        self.write(collection_name, timeout, move |_| {
            let (points, filter) = selection_in("points_selector", points_selector)?.into_options();
            let keys = keys.iter().map(|key| path_in(key)).collect::<Answer<_>>()?;
            let operation = edge::DeletePayloadOp { keys, points, filter };
            Ok(UpdateOperation::PayloadOperation(PayloadOps::DeletePayload(operation)))
        })
        .await
    }

    async fn clear_payload(
        &self,
        request: Request<pb::ClearPayloadPoints>,
    ) -> Reply<pb::PointsOperationResponse> {
        let pb::ClearPayloadPoints {
            collection_name,
            wait: _,
            points,
            ordering: _,
            shard_key_selector,
            timeout,
        } = request.into_inner();
        absent("ClearPayloadPoints.shard_key_selector", &shard_key_selector)?;
        self.write(collection_name, timeout, move |_| {
            Ok(UpdateOperation::PayloadOperation(match selection_in("points", points)? {
                Selection::Ids(points) => PayloadOps::ClearPayload { points },
                Selection::Filter(filter) => PayloadOps::ClearPayloadByFilter(filter),
            }))
        })
        .await
    }

    async fn create_field_index(
        &self,
        request: Request<pb::CreateFieldIndexCollection>,
    ) -> Reply<pb::PointsOperationResponse> {
        let pb::CreateFieldIndexCollection {
            collection_name,
            wait: _,
            field_name,
            field_type,
            field_index_params,
            ordering: _,
            timeout,
        } = request.into_inner();
        self.write(collection_name, timeout, move |_| {
            let index = edge::CreateIndex {
                field_name: path_in(&field_name)?,
                field_schema: Some(schema_in(field_type, field_index_params)?),
            };
            Ok(UpdateOperation::FieldIndexOperation(FieldIndexOperations::CreateIndex(index)))
        })
        .await
    }

    async fn delete_field_index(
        &self,
        request: Request<pb::DeleteFieldIndexCollection>,
    ) -> Reply<pb::PointsOperationResponse> {
        let pb::DeleteFieldIndexCollection { collection_name, wait: _, field_name, ordering: _, timeout } =
            request.into_inner();
        self.write(collection_name, timeout, move |_| {
            let field = path_in(&field_name)?;
            Ok(UpdateOperation::FieldIndexOperation(FieldIndexOperations::DeleteIndex(field)))
        })
        .await
    }

    async fn get(&self, request: Request<pb::GetPoints>) -> Reply<pb::GetResponse> {
        let pb::GetPoints {
            collection_name,
            ids,
            with_payload,
            with_vectors,
            read_consistency: _,
            shard_key_selector,
            timeout,
        } = request.into_inner();
        absent("GetPoints.shard_key_selector", &shard_key_selector)?;
        let (result, time) = self
            .read(collection_name, timeout, move |collection| {
                let mut retrieve = edge::RetrieveRequest::new(ids_in(ids)?);
                retrieve.with_payload = Some(with_payload_in(with_payload, true)?);
                retrieve.with_vector = Some(with_vectors_in(with_vectors, collection.shape())?);
                let records = collection.shard().retrieve(retrieve).map_err(from_engine)?;
                Ok(records.into_iter().map(record_out).collect())
            })
            .await?;
        Ok(Response::new(pb::GetResponse { result, time, usage: None }))
    }

    async fn scroll(&self, request: Request<pb::ScrollPoints>) -> Reply<pb::ScrollResponse> {
        let pb::ScrollPoints {
            collection_name,
            filter,
            offset,
            limit,
            with_payload,
            with_vectors,
            read_consistency: _,
            shard_key_selector,
            order_by,
            timeout,
        } = request.into_inner();
        absent("ScrollPoints.shard_key_selector", &shard_key_selector)?;
        if order_by.is_some() && offset.is_some() {
            return Err(invalid("`offset` cannot be used together with `order_by`"));
        }
        let ((result, next_page_offset), time) = self
            .read(collection_name, timeout, move |collection| {
                let mut scroll = edge::ScrollRequest::new();
                scroll.offset = offset.map(id_in).transpose()?;
                scroll.limit = Some(limit_in("limit", limit.map(u64::from))?);
                scroll.filter = optional_in(filter)?;
                scroll.with_payload = Some(with_payload_in(with_payload, true)?);
                scroll.with_vector = with_vectors_in(with_vectors, collection.shape())?;
                let order = order_by.map(order_by_in).transpose()?;
                scroll.order_by = order.map(edge::OrderByInterface::Struct);
                let (records, next) = collection.shard().scroll(scroll).map_err(from_engine)?;
                Ok((records.into_iter().map(record_out).collect(), next.map(id_out)))
            })
            .await?;
        Ok(Response::new(pb::ScrollResponse { result, next_page_offset, time, usage: None }))
    }

    async fn count(&self, request: Request<pb::CountPoints>) -> Reply<pb::CountResponse> {
        let pb::CountPoints {
            collection_name,
            filter,
            // An exact count is also a good approximation.
            exact: _,
            read_consistency: _,
            shard_key_selector,
            timeout,
        } = request.into_inner();
        absent("CountPoints.shard_key_selector", &shard_key_selector)?;
        let (count, time) = self
            .read(collection_name, timeout, move |collection| {
                let mut count = edge::CountRequest::new();
                count.exact = true;
                count.filter = optional_in(filter)?;
                Ok(collection.shard().count(count).map_err(from_engine)? as u64)
            })
            .await?;
        Ok(Response::new(pb::CountResponse { result: Some(pb::CountResult { count }), time, usage: None }))
    }

    async fn query(&self, request: Request<pb::QueryPoints>) -> Reply<pb::QueryResponse> {
        let mut query = request.into_inner();
        let collection_name = std::mem::take(&mut query.collection_name);
        let timeout = query.timeout.take();
        let (result, time) =
            self.read(collection_name, timeout, move |collection| queries::query(collection, query)).await?;
        Ok(Response::new(pb::QueryResponse { result, time, usage: None }))
    }

    async fn query_batch(&self, request: Request<pb::QueryBatchPoints>) -> Reply<pb::QueryBatchResponse> {
        let pb::QueryBatchPoints { collection_name, query_points, read_consistency: _, timeout } =
            request.into_inner();
        for query in &query_points {
            absent("QueryBatchPoints.query_points.timeout", &query.timeout)?;
            if !query.collection_name.is_empty() && query.collection_name != collection_name {
                return Err(invalid(format!(
                    "a query of the batch names collection `{}`, but the batch is for `{collection_name}`",
                    query.collection_name
                )));
            }
        }
        let (result, time) = self
            .read(collection_name, timeout, move |collection| {
                let answers = queries::query_batch(collection, query_points)?;
                Ok(answers.into_iter().map(|result| pb::BatchResult { result }).collect())
            })
            .await?;
        Ok(Response::new(pb::QueryBatchResponse { result, time, usage: None }))
    }

    unsupported_methods! {
        update_batch: UpdateBatchPoints -> UpdateBatchResponse;
        update_vectors: UpdatePointVectors -> PointsOperationResponse;
        delete_vectors: DeletePointVectors -> PointsOperationResponse;
        create_vector_name: CreateVectorNameRequest -> PointsOperationResponse;
        delete_vector_name: DeleteVectorNameRequest -> PointsOperationResponse;
        search: SearchPoints -> SearchResponse;
        search_batch: SearchBatchPoints -> SearchBatchResponse;
        search_groups: SearchPointGroups -> SearchGroupsResponse;
        recommend: RecommendPoints -> RecommendResponse;
        recommend_batch: RecommendBatchPoints -> RecommendBatchResponse;
        recommend_groups: RecommendPointGroups -> RecommendGroupsResponse;
        discover: DiscoverPoints -> DiscoverResponse;
        discover_batch: DiscoverBatchPoints -> DiscoverBatchResponse;
        query_groups: QueryPointGroups -> QueryGroupsResponse;
        facet: FacetCounts -> FacetResponse;
        search_matrix_pairs: SearchMatrixPoints -> SearchMatrixPairsResponse;
        search_matrix_offsets: SearchMatrixPoints -> SearchMatrixOffsetsResponse;
    }
}
