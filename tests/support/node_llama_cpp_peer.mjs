// Greedy tokens by node-llama-cpp, for tests/test_deploy_peers.py: its prebuilt binary, CPU, one sequence.
// node node_llama_cpp_peer.mjs < {"package", "model", "n_ctx", "n_threads", "max_tokens", "prompts": [[id, ...]]}
import {createRequire} from "node:module";
import {readFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const job = JSON.parse(readFileSync(0, "utf8"));
const require = createRequire(join(job.package, "package.json"));
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: job.model, gpuLayers: 0});
const context = await model.createContext({contextSize: job.n_ctx, threads: job.n_threads, flashAttention: false});
const sequence = context.getSequence();
const answers = [];
for (const prompt of job.prompts) {
    await sequence.clearHistory();
    const tokens = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        if (tokens.length >= job.max_tokens || model.isEogToken(token)) break;
        tokens.push(token);
    }
    answers.push(tokens);
}
console.log(JSON.stringify({build: llama.llamaCppRelease, type: llama.buildType, answers}));
await llama.dispose();
