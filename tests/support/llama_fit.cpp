// What llama.cpp itself plans for a model on this machine's devices, in bytes: no weights are read, nothing is allocated.
//
//   llama-fit MODEL < jobs
//
// A job is a line of key=value words: n_ctx, n_batch, n_ubatch, fa (-1 auto, 0, 1), ngl, ts (1,1), ot (a pattern of
// tensors that stay in memory, may be repeated); load (a backend library) and rpc (an endpoint) hold for all jobs after
// them. `fit=BYTES` asks common_fit_params, which llama-server and llama-fit-params call, for devices of that size with
// its own margin of 1 GiB; a job without it is planned as it stands. The answer is a line of JSON.
//
//   LLAMA_FIT_CARD_BYTES=25769803776 llama-fit --serve BACKEND.so HOST:PORT
//
// A pretended card of that size: llama.cpp's RPC server on the processor. For plans; it holds no weights.
#include "fit.h"
#include "ggml-backend.h"
#include "llama.h"
#include "log.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <list>
#include <sstream>
#include <string>
#include <vector>

bool tty_can_use_colors() { return false; } // of common.cpp, for the log

static const size_t MARGIN = 1024 * 1024 * 1024;
static const uint32_t MIN_CTX = 4096; // of --fit, where the context is left open

// In place of libggml-base's: the pretended card has the memory that was asked for.
extern "C" void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total) {
    if (const char * bytes = getenv("LLAMA_FIT_CARD_BYTES")) {
        *free = *total = std::stoull(bytes);
        return;
    }
    ((decltype(&ggml_backend_dev_memory)) dlsym(RTLD_NEXT, "ggml_backend_dev_memory"))(device, free, total);
}

static int serve(const char * library, const char * endpoint) {
    ggml_backend_reg_t reg = ggml_backend_load(library);
    ggml_backend_dev_t processor = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    using start_t = void (*)(const char *, const char *, size_t, size_t, ggml_backend_dev_t *);
    auto start = reg ? (start_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_rpc_start_server") : nullptr;
    if (!start || !processor) { return 2; }
    start(endpoint, nullptr, 1, 1, &processor);
    return 1; // it ends with its process
}

struct Job {
    llama_model_params model = llama_model_default_params();
    llama_context_params context = llama_context_default_params();
    std::vector<float> split = std::vector<float>(llama_max_devices(), 0.0f);
    std::vector<llama_model_tensor_buft_override> overrides =
        std::vector<llama_model_tensor_buft_override>(llama_max_tensor_buft_overrides(), {nullptr, nullptr});
    std::list<std::string> patterns;
    long long fit_bytes = 0;

    Job() {
        model.use_extra_bufts = false; // --no-repack: llama.cpp does not count those buffers for any device
        context.n_ctx = 4096; // llama-server's defaults for one slot
        context.n_batch = 2048;
        context.n_ubatch = 512;
        context.swa_full = false;
        context.n_seq_max = 1;
        context.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_AUTO;
    }
};

static void add_rpc(const std::string & endpoint) {
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("RPC");
    auto add = reg ? (ggml_backend_reg_t (*)(const char *)) ggml_backend_reg_get_proc_address(reg, "ggml_backend_rpc_add_server")
                   : nullptr;
    ggml_backend_reg_t server = add ? add(endpoint.c_str()) : nullptr;
    if (!server) {
        fprintf(stderr, "no RPC server at %s\n", endpoint.c_str());
        exit(2);
    }
    ggml_backend_register(server);
}

static bool read_job(const std::string & line, Job & job) {
    std::istringstream words(line);
    std::string word;
    size_t n = 0;
    bool any = false;
    while (words >> word) {
        const std::string key = word.substr(0, word.find('=')), value = word.substr(word.find('=') + 1);
        any = any || (key != "load" && key != "rpc");
        if (key == "load") { if (!ggml_backend_load(value.c_str())) { exit(2); } }
        else if (key == "rpc") { add_rpc(value); }
        else if (key == "n_ctx") { job.context.n_ctx = std::stoul(value); }
        else if (key == "n_batch") { job.context.n_batch = std::stoul(value); }
        else if (key == "n_ubatch") { job.context.n_ubatch = std::stoul(value); }
        else if (key == "fa") { job.context.flash_attn_type = (llama_flash_attn_type) std::stoi(value); }
        else if (key == "ngl") { job.model.n_gpu_layers = std::stoi(value); }
        else if (key == "fit") { job.fit_bytes = std::stoll(value); }
        else if (key == "ts") {
            std::istringstream parts(value);
            std::string part;
            for (size_t i = 0; std::getline(parts, part, ','); i++) { job.split[i] = std::stof(part); }
            job.model.tensor_split = job.split.data();
        }
        else if (key == "ot") {
            job.patterns.push_back(value);
            job.overrides[n++] = {job.patterns.back().c_str(), ggml_backend_cpu_buffer_type()};
            job.model.tensor_buft_overrides = job.overrides.data();
        }
        else { fprintf(stderr, "unknown: %s\n", word.c_str()); exit(2); }
    }
    return any;
}

static std::string escaped(const std::string & text) {
    std::string out;
    for (char c : text) { out += c == '\\' || c == '"' ? std::string("\\") + c : std::string(1, c); }
    return out;
}

int main(int argc, char ** argv) {
    if (argc == 4 && std::string(argv[1]) == "--serve") { return serve(argv[2], argv[3]); }
    if (argc != 2) { fprintf(stderr, "usage: llama-fit MODEL < jobs\n"); return 2; }
    const bool verbose = getenv("LLAMA_FIT_LOG") != nullptr;
    llama_log_set([](ggml_log_level level, const char * text, void * all) {
        if (all || level >= GGML_LOG_LEVEL_WARN) { fputs(text, stderr); }
    }, verbose ? (void *) 1 : nullptr);
    if (verbose) { common_log_set_verbosity_thold(LOG_LEVEL_TRACE); }
    llama_backend_init();
    std::string line;
    while (std::getline(std::cin, line)) {
        Job job;
        if (!read_job(line, job)) { continue; }
        int status = 0;
        if (job.fit_bytes) {
            std::vector<size_t> margins(llama_max_devices(), MARGIN);
            for (size_t i = 0, n = 0; i < ggml_backend_dev_count(); i++) { // so that only fit_bytes - MARGIN are used
                ggml_backend_dev_t device = ggml_backend_dev_get(i);
                if (ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_GPU) { continue; }
                size_t free, total;
                ggml_backend_dev_memory(device, &free, &total);
                const long long spare = (long long) free - job.fit_bytes + (long long) MARGIN;
                margins[n++] = spare > 0 ? spare : 0;
            }
            status = common_fit_params(argv[1], &job.model, &job.context, job.split.data(), job.overrides.data(),
                                       margins.data(), MIN_CTX, nullptr, GGML_LOG_LEVEL_ERROR);
        }
        std::vector<ggml_backend_dev_t> devices;
        uint32_t n_layers, n_train, n_expert;
        common_device_memory_data_vec rows;
        try {
            rows = common_get_device_memory_data(argv[1], &job.model, &job.context, devices, n_layers, n_train, n_expert,
                                                 GGML_LOG_LEVEL_WARN);
        } catch (const std::exception & error) {
            printf("{\"job\": \"%s\", \"error\": \"%s\"}\n", escaped(line).c_str(), escaped(error.what()).c_str());
            fflush(stdout);
            continue;
        }
        printf("{\"job\": \"%s\", \"status\": %d, \"n_ctx\": %u, \"ngl\": %d, \"ts\": [", escaped(line).c_str(), status,
               job.context.n_ctx, job.model.n_gpu_layers);
        for (size_t i = 0; i < devices.size(); i++) { printf("%s%g", i ? ", " : "", job.split[i]); }
        printf("], \"ot\": [");
        for (size_t i = 0; job.model.tensor_buft_overrides && job.model.tensor_buft_overrides[i].pattern; i++) {
            const auto & row = job.model.tensor_buft_overrides[i];
            printf("%s[\"%s\", \"%s\"]", i ? ", " : "", escaped(row.pattern).c_str(), ggml_backend_buft_name(row.buft));
        }
        printf("], \"devices\": [");
        for (size_t i = 0; i < rows.size(); i++) { // memory is the last
            const char * name = i < devices.size() ? ggml_backend_dev_name(devices[i]) : "RAM";
            printf("%s{\"name\": \"%s\", \"total\": %lld, \"free\": %lld, \"model\": %zu, \"context\": %zu, \"compute\": %zu}",
                   i ? ", " : "", name, (long long) rows[i].total, (long long) rows[i].free, rows[i].model,
                   rows[i].context, rows[i].compute);
        }
        printf("]}\n");
        fflush(stdout);
    }
    return 0;
}
