//! `qdrant.Collections`: collections and aliases.

use pb::collections_server::Collections;
use qdrant_client::qdrant as pb;
use tonic::{Request, Response, Status};

use super::Service;
use crate::convert::{collections as settings, info};
use crate::unsupported::{absent, unsupported_methods};

type Reply<T> = Result<Response<T>, Status>;

fn done((result, time): (bool, f64)) -> Response<pb::CollectionOperationResponse> {
    Response::new(pb::CollectionOperationResponse { result, time })
}

#[tonic::async_trait]
impl Collections for Service {
    async fn get(
        &self,
        request: Request<pb::GetCollectionInfoRequest>,
    ) -> Reply<pb::GetCollectionInfoResponse> {
        let pb::GetCollectionInfoRequest { collection_name } = request.into_inner();
        let (result, time) =
            self.run(None, move |store| info::describe(&*store.get(&collection_name)?)).await?;
        Ok(Response::new(pb::GetCollectionInfoResponse { result: Some(result), time }))
    }

    async fn list(&self, request: Request<pb::ListCollectionsRequest>) -> Reply<pb::ListCollectionsResponse> {
        let pb::ListCollectionsRequest {} = request.into_inner();
        let collections = self.store.collections();
        let names = collections.iter().map(|collection| collection.name().to_owned());
        Ok(Response::new(pb::ListCollectionsResponse {
            collections: names.map(|name| pb::CollectionDescription { name }).collect(),
            time: 0.0,
        }))
    }

    async fn create(&self, request: Request<pb::CreateCollection>) -> Reply<pb::CollectionOperationResponse> {
        let mut spec = request.into_inner();
        // Not part of what is stored.
        let timeout = spec.timeout.take();
        self.run(timeout, move |store| store.create(spec).map(|()| true)).await.map(done)
    }

    async fn update(&self, request: Request<pb::UpdateCollection>) -> Reply<pb::CollectionOperationResponse> {
        let pb::UpdateCollection {
            collection_name,
            optimizers_config,
            timeout,
            params,
            hnsw_config,
            vectors_config,
            quantization_config,
            sparse_vectors_config,
            strict_mode_config,
            metadata,
        } = request.into_inner();
        absent("UpdateCollection.params", &params)?;
        absent("UpdateCollection.vectors_config", &vectors_config)?;
        absent("UpdateCollection.quantization_config", &quantization_config)?;
        absent("UpdateCollection.sparse_vectors_config", &sparse_vectors_config)?;
        absent("UpdateCollection.strict_mode_config", &strict_mode_config)?;
        self.run(timeout, move |store| {
            let collection = store.get(&collection_name)?;
            let config = collection.shard().config().clone();
            let hnsw = hnsw_config.map(|diff| settings::hnsw_in(&diff, config.hnsw_config())).transpose()?;
            let optimizers = optimizers_config
                .map(|diff| settings::optimizers_in(&diff, config.optimizers()))
                .transpose()?;
            collection.reconfigure(hnsw, optimizers, metadata)?;
            Ok(true)
        })
        .await
        .map(done)
    }

    async fn delete(&self, request: Request<pb::DeleteCollection>) -> Reply<pb::CollectionOperationResponse> {
        let pb::DeleteCollection { collection_name, timeout } = request.into_inner();
        self.run(timeout, move |store| store.delete(&collection_name)).await.map(done)
    }

    async fn collection_exists(
        &self,
        request: Request<pb::CollectionExistsRequest>,
    ) -> Reply<pb::CollectionExistsResponse> {
        let pb::CollectionExistsRequest { collection_name } = request.into_inner();
        let exists = self.store.get(&collection_name).is_ok();
        Ok(Response::new(pb::CollectionExistsResponse {
            result: Some(pb::CollectionExists { exists }),
            time: 0.0,
        }))
    }

    async fn update_aliases(
        &self,
        request: Request<pb::ChangeAliases>,
    ) -> Reply<pb::CollectionOperationResponse> {
        let pb::ChangeAliases { actions, timeout } = request.into_inner();
        self.run(timeout, move |store| store.change_aliases(actions).map(|()| true)).await.map(done)
    }

    async fn list_collection_aliases(
        &self,
        request: Request<pb::ListCollectionAliasesRequest>,
    ) -> Reply<pb::ListAliasesResponse> {
        let pb::ListCollectionAliasesRequest { collection_name } = request.into_inner();
        let aliases = self.store.aliases();
        Ok(describe_aliases(aliases.into_iter().filter(|(_, target)| *target == collection_name)))
    }

    async fn list_aliases(&self, request: Request<pb::ListAliasesRequest>) -> Reply<pb::ListAliasesResponse> {
        let pb::ListAliasesRequest {} = request.into_inner();
        Ok(describe_aliases(self.store.aliases().into_iter()))
    }

    unsupported_methods! {
        collection_cluster_info: CollectionClusterInfoRequest -> CollectionClusterInfoResponse;
        update_collection_cluster_setup:
            UpdateCollectionClusterSetupRequest -> UpdateCollectionClusterSetupResponse;
        create_shard_key: CreateShardKeyRequest -> CreateShardKeyResponse;
        delete_shard_key: DeleteShardKeyRequest -> DeleteShardKeyResponse;
        list_shard_keys: ListShardKeysRequest -> ListShardKeysResponse;
    }
}

fn describe_aliases(aliases: impl Iterator<Item = (String, String)>) -> Response<pb::ListAliasesResponse> {
    let aliases = aliases
        .map(|(alias_name, collection_name)| pb::AliasDescription { alias_name, collection_name })
        .collect();
    Response::new(pb::ListAliasesResponse { aliases, time: 0.0 })
}
