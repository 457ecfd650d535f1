// Gradients of keys and values for Hopper, heads of 256 features: one warp group sums those of 64 values, another those
// of the same 64 keys, since the registers of one do not hold both. Each computes the scores for itself.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_hopper_dkv(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                     const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dout_map,
                     const Span* spans, const Tile* tiles, u32 items, u32* counter, Shape shape,
                     const float2* statistics, u32 rows, Target dk_to, Target dv_to) {
    u32 shared = shared_start();
    DkvBarriers at(shared);
    if (threadIdx.x == 0) at.init();
    __syncthreads();
    int group = (int)(threadIdx.x >> 7) - 1;
    if (group < 0) {
        give_registers<LOADER_REGISTERS>();
        if (threadIdx.x < 32) {
            load_for_keys(shared, at, &q_map, &k_map, &v_map, &dout_map, spans, tiles, items, counter, shape, statistics,
                          rows);
        }
    } else {
        take_registers<WORKER_REGISTERS>();
        bool leader = (threadIdx.x & 31) == 0, for_keys = group == 1;
        u32 round = 0;
        Place place = {0, 0};
        int own_row = (int)((threadIdx.x & 127) >> 5) * 16 + (int)((threadIdx.x & 31) >> 2);
        float scale = exponent_scale(shape);
        for (;; round++) {
            barrier_wait(at.keys_full, round & 1);
            Keys keys = *told<Keys>(shared, DKV_TOLD_AT);
            if (!keys.left) break;
            float sums[HEAD_DIM / 2];
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) sums[i] = 0.0f;
            float s[DKV_BLOCK / 2], d[DKV_BLOCK / 2], slope[DKV_BLOCK / 2];
            u32 p[DKV_BLOCK / 4];
            int count = keys.blocks * (int)shape.group, block = keys.begin;
            auto begin_scores = [&]() {
                barrier_wait(at.queries_full + 8 * place.stage, place.parity);
                products_begin();
                product_straight<DKV_BLOCK, HEAD_DIM, KEY_ROWS, DKV_BLOCK, STRETCH>(
                    s, shared + DKV_KEYS_AT, shared + DKV_QUERIES_AT + place.stage * TILE_BYTES(DKV_BLOCK));
                products_commit();
            };
            auto begin_slopes = [&]() {
                barrier_wait(at.slopes_full + 8 * place.stage, place.parity);
                products_begin();
                product_straight<DKV_BLOCK, HEAD_DIM, KEY_ROWS, DKV_BLOCK, STRETCH>(
                    d, shared + DKV_VALUES_AT, shared + DKV_SLOPES_AT + place.stage * TILE_BYTES(DKV_BLOCK));
                products_commit();
            };
            auto pairs = [&]() { return shared + DKV_STATISTICS_AT + place.stage * DKV_BLOCK * 8 + 16 * (threadIdx.x & 3); };
            auto probabilities = [&]() {
                turned_probabilities(s, slope, shape, keys, block, 0, own_row, pairs(), scale);
                if (++block == keys.begin + keys.blocks) block = keys.begin;
            };
            auto add = [&](u32 from) {
                pin(p);
                pin(sums);
                products_begin();
                product_registers<HEAD_DIM, DKV_BLOCK, DKV_BLOCK, STRETCH>(sums, p, from);
                products_commit();
                products_wait<0>();
                pin(sums);
            };
            if (for_keys) {
                for (int i = 0; i < count; i++, place.next()) {
                    begin_scores();
                    begin_slopes();
                    products_wait<1>();
                    probabilities();
                    products_wait<0>();
                    turned_slopes(s, slope, d, pairs());
                    pack_all(d, p);
                    add(shared + DKV_QUERIES_AT + place.stage * TILE_BYTES(DKV_BLOCK));
                    if (leader) barrier_arrive(at.empty + 8 * place.stage);
                }
            } else {
                for (int i = 0; i < count; i++, place.next()) {
                    begin_scores();
                    products_wait<0>();
                    probabilities();
                    pack_all(s, p);
                    barrier_wait(at.slopes_full + 8 * place.stage, place.parity);
                    add(shared + DKV_SLOPES_AT + place.stage * TILE_BYTES(DKV_BLOCK));
                    if (leader) barrier_arrive(at.empty + 8 * place.stage);
                }
            }
            if (leader) barrier_arrive(at.keys_empty);
            Target to = for_keys ? dk_to : dv_to;
            float factor = for_keys ? shape.scale : 1.0f;
            store_rows(sums, to.data + (u64)keys.row * to.stride + keys.head * HEAD_DIM, to.stride, keys.valid, factor, factor);
        }
    }
}
