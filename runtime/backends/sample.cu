// Samples of preprocessed volumes: straight from a scan's stored voxels, by the arithmetic of preprocess.py, operation by
// operation, so that results are the same bits; or of volumes that are on the device. Compile without contracting products
// and sums (--fmad=false).

enum Kind { INT8, UINT8, INT16, UINT16, INT32, UINT32, FLOAT32, FLOAT64 };

// Where the samples of one output axis come from; output indices outside [start, start + count) are padding.
struct Axis {
    const int *lower, *upper;
    const float *weight;
    int start, count, length;
};

struct Job {
    const void *voxels;
    long long offset, stride_h, stride_w, stride_d;  // of the stored voxels, in elements
    double slope[4], intercept[4];                   // to Hounsfield units, one map after the other
    int maps, kind, small;                           // small: integers of at most 16 bits, computed in float
    float clip_low, clip_high, resampling_scale, window_low, window_high, offset_hu, scale_hu, pad;
    Axis h, w, d;
    void *result;  // [D, H, W]
    int half;      // result is float16
};

__device__ static double stored(const Job &job, long long index) {
    switch (job.kind) {
        case INT8: return ((const signed char *)job.voxels)[index];
        case UINT8: return ((const unsigned char *)job.voxels)[index];
        case INT16: return ((const short *)job.voxels)[index];
        case UINT16: return ((const unsigned short *)job.voxels)[index];
        case INT32: return ((const int *)job.voxels)[index];
        case UINT32: return ((const unsigned int *)job.voxels)[index];
        case FLOAT32: return ((const float *)job.voxels)[index];
        default: return ((const double *)job.voxels)[index];
    }
}

__device__ static float clip(float value, float low, float high) {
    return value < low ? low : value > high ? high : value;
}

__device__ static float hounsfield(const Job &job, int h, int w, int d) {
    double exact = stored(job, job.offset + h * job.stride_h + w * job.stride_w + d * job.stride_d);
    float value = (float)exact;
    for (int map = 0; map < job.maps; ++map) {
        if (job.small) {
            value = value * (float)job.slope[map];
            value = value + (float)job.intercept[map];
        } else {
            exact = exact * job.slope[map];
            exact = exact + job.intercept[map];
        }
    }
    if (!job.small) value = (float)exact;
    return clip(value, job.clip_low, job.clip_high) / job.resampling_scale;
}

__device__ static float blend(float lower, float upper, float weight) {
    float one = lower * (1.0f - weight);
    float other = upper * weight;
    return one + other;
}

// To the nearest float16, ties to even.
__device__ static unsigned short to_half(float value) {
    union { float f; unsigned int u; } bits = {value};
    unsigned int sign = (bits.u >> 16) & 0x8000u;
    bits.u &= 0x7fffffffu;
    if (!(bits.f < 65520.0f))                              // infinity, or NaN, which is less than nothing
        return (unsigned short)(sign | (bits.f == bits.f ? 0x7c00u : 0x7e00u));
    if (bits.f < 6.103515625e-05f) {                       // below 2^-14 a half's steps are 2^-24
        bits.f = bits.f + 0.5f;                            // whose last bit, added to a half, is a float's last
        return (unsigned short)(sign | (bits.u - 0x3f000000u));
    }
    unsigned int odd = (bits.u >> 13) & 1u;
    return (unsigned short)(sign | ((bits.u - 0x38000000u + 0xfffu + odd) >> 13));
}

__device__ static float from_half(unsigned short half) {
    unsigned int sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
    union { unsigned int u; float f; } bits = {rest << 13};
    if (rest >= 0x7c00u)
        bits.u |= 0x7f800000u;
    else
        bits.f *= 5.192296858534828e33f;                   // 2^112, between the exponents' biases; exact
    bits.u |= sign;
    return bits.f;
}

__device__ static float sample(const Job &job, int h, int w, int d) {
    int kh = h - job.h.start, kw = w - job.w.start, kd = d - job.d.start;
    if (kh < 0 || kh >= job.h.count || kw < 0 || kw >= job.w.count || kd < 0 || kd >= job.d.count) return job.pad;
    int hs[2] = {job.h.lower[kh], job.h.upper[kh]};
    int ws[2] = {job.w.lower[kw], job.w.upper[kw]};
    float rows[2];
    for (int i = 0; i < 2; ++i) {
        float ends[2];
        for (int j = 0; j < 2; ++j)
            ends[j] = blend(hounsfield(job, hs[i], ws[j], job.d.lower[kd]), hounsfield(job, hs[i], ws[j], job.d.upper[kd]),
                            job.d.weight[kd]);
        rows[i] = blend(ends[0], ends[1], job.w.weight[kw]);
    }
    float value = blend(rows[0], rows[1], job.h.weight[kh]) * job.resampling_scale;
    value = clip(value, job.window_low, job.window_high);
    value = value + job.offset_hu;
    return value / job.scale_hu;
}

// One thread for each sample. Neighbouring threads are neighbours along H, which files store side by side.
extern "C" __global__ void sample_lines(Job job) {
    long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (long long)job.h.length * job.w.length * job.d.length) return;
    int h = (int)(index % job.h.length);
    int w = (int)(index / job.h.length % job.w.length);
    int d = (int)(index / ((long long)job.h.length * job.w.length));
    float value = sample(job, h, w, d);
    long long at = ((long long)d * job.h.length + h) * job.w.length + w;
    if (job.half)
        ((unsigned short *)job.result)[at] = to_half(value);
    else
        ((float *)job.result)[at] = value;
}

// Samples of volumes that are preprocessed and on the device already.
struct Thinning {
    const void *volumes;                                      // [B, D, H, W]
    void *result;                                             // [batch, depth, height, width]; null: only look
    int *outside;                                             // becomes 1 where a sample is not in [low, high]
    long long stride_b, stride_d, stride_h, stride_w;         // from one sample to the next, in elements
    int batch, depth, height, width;
    int from_float16, to_float16;
    float low, high;
};

extern "C" __global__ void thin(Thinning job) {
    long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (long long)job.batch * job.depth * job.height * job.width) return;
    long long rest = index / job.width;
    long long from = (index % job.width) * job.stride_w + (rest % job.height) * job.stride_h;
    rest /= job.height;
    from += (rest % job.depth) * job.stride_d + (rest / job.depth) * job.stride_b;
    float value = job.from_float16 ? from_half(((const unsigned short *)job.volumes)[from])
                                   : ((const float *)job.volumes)[from];
    if (!(value >= job.low && value <= job.high)) *job.outside = 1;
    if (!job.result) return;
    if (job.to_float16)
        ((unsigned short *)job.result)[index] = to_half(value);
    else
        ((float *)job.result)[index] = value;
}
