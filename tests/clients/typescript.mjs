// Drives the everything server with the official TypeScript client and says what holds.
//
//     node typescript.mjs URL VERSION|auto [NODES]
//
// Prints a PASS or FAIL line for each check; exits with 1 if one failed. A VERSION such as 2025-11-25 opens a session by
// the initialize handshake; `auto` lets the client find out that the server speaks 2026-07-28, where there is none. With
// NODES, calls must have been run by that many processes.

import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';

const [url, mode, nodes = '1'] = process.argv.slice(2);
// Older clients cannot read the event that a stream begins with, so they get none, and no stream is closed on them.
const PRIMED = mode >= '2025-11-25';
const WAIT = 10_000;
const WATCHED = 'test://watched-resource';
const ROOT = { uri: 'file:///home', name: 'home' };

let failures = 0;

async function check(name, body) {
    try {
        await within(body());
        console.log(`PASS ${name}`);
    } catch (error) {
        failures += 1;
        console.log(`FAIL ${name}: ${error?.stack ?? error}`);
    }
}

async function within(promise) {
    let timer;
    const late = new Promise((_, reject) => {
        timer = setTimeout(() => reject(new Error(`nothing for ${WAIT} ms`)), WAIT);
    });
    try {
        return await Promise.race([promise, late]);
    } finally {
        clearTimeout(timer);
    }
}

function equal(got, wanted) {
    if (JSON.stringify(got) !== JSON.stringify(wanted)) {
        throw new Error(`got ${JSON.stringify(got)}, wanted ${JSON.stringify(wanted)}`);
    }
}

function holds(condition, what) {
    if (!condition) throw new Error(what);
}

// Everything that arrives, and a promise for when there is enough of it.
class Inbox {
    #items = [];
    #waiting = [];

    add(item) {
        this.#items.push(item);
        this.#waiting = this.#waiting.filter(({ count, resolve }) => {
            if (this.#items.length < count) return true;
            resolve();
            return false;
        });
    }

    async take(count) {
        if (this.#items.length < count) {
            await within(new Promise(resolve => this.#waiting.push({ count, resolve })));
        }
        return this.#items.splice(0);
    }
}

// The network: counts what the client sends, and can cut a response off.
class Wire {
    requests = [];
    #cut = 0;

    // The next SSE answer to a POST breaks after this many messages.
    cutNextAfter(messages) {
        this.#cut = messages;
    }

    fetch = async (input, init = {}) => {
        const headers = new Headers(init.headers);
        this.requests.push({ method: init.method ?? 'GET', resumed: headers.has('last-event-id') });
        const response = await fetch(input, init);
        const streams = response.headers.get('content-type')?.startsWith('text/event-stream');
        if (init.method !== 'POST' || !this.#cut || !streams) return response;
        const body = broken(response.body, this.#cut);
        this.#cut = 0;
        return new Response(body, { status: response.status, headers: response.headers });
    };

    resumes() {
        return this.requests.filter(request => request.resumed).length;
    }
}

function broken(body, messages) {
    const decoder = new TextDecoder();
    const reader = body.getReader();
    let left = messages;
    return new ReadableStream({
        async pull(controller) {
            const { value, done } = await reader.read();
            if (done) return controller.close();
            controller.enqueue(value);
            left -= decoder.decode(value, { stream: true }).split('data: {').length - 1;
            if (left <= 0) {
                await reader.cancel();
                controller.error(new Error('the network broke'));
            }
        },
        cancel: () => reader.cancel(),
    });
}

const inbox = { logs: new Inbox(), tools: new Inbox(), updates: new Inbox() };

function make(negotiation) {
    const client = new Client(
        { name: 'typescript-check', version: '1.0.0' },
        {
            capabilities: { sampling: {}, elicitation: { form: {} }, roots: {} },
            versionNegotiation: { mode: negotiation },
            ...(negotiation === 'legacy' && { supportedProtocolVersions: [mode] }),
        },
    );
    client.setRequestHandler('sampling/createMessage', async request => ({
        role: 'assistant',
        content: { type: 'text', text: `Echo: ${request.params.messages[0].content.text}` },
        model: 'echo',
        stopReason: 'endTurn',
    }));
    client.setRequestHandler('elicitation/create', async request => ({
        action: 'accept',
        content: Object.fromEntries(
            Object.entries(request.params.requestedSchema.properties).map(([name, schema]) => [
                name,
                schema.type === 'boolean' ? true : `my ${name}`,
            ]),
        ),
    }));
    client.setRequestHandler('roots/list', async () => ({ roots: [ROOT] }));
    client.setNotificationHandler('notifications/message', message => inbox.logs.add(message.params.data));
    client.setNotificationHandler('notifications/tools/list_changed', () => inbox.tools.add('changed'));
    client.setNotificationHandler('notifications/resources/updated', message => inbox.updates.add(message.params.uri));
    return client;
}

const wire = new Wire();
const open = options => new StreamableHTTPClientTransport(new URL(url), { fetch: wire.fetch, ...options });
const text = result => result.content.map(part => part.text).join('');
const call = async (client, name, args = {}, options = undefined) =>
    text(await client.callTool({ name, arguments: args }, options));

async function progress(client) {
    const seen = [];
    const said = await call(client, 'test_tool_with_progress', {}, { onprogress: one => seen.push(one.progress) });
    equal(said, 'Progress completed');
    equal(seen, [0, 50, 100]);
}

async function common(client) {
    await check('lists tools, resources, templates and prompts', async () => {
        const { tools } = await client.listTools();
        holds(tools.some(tool => tool.name === 'test_simple_text'), 'a tool is missing');
        const { resources } = await client.listResources();
        holds(resources.some(resource => resource.uri === WATCHED), 'a resource is missing');
        const { resourceTemplates } = await client.listResourceTemplates();
        equal(resourceTemplates.map(template => template.uriTemplate), ['test://template/{id}/data']);
        const { prompts } = await client.listPrompts();
        holds(prompts.some(prompt => prompt.name === 'test_simple_prompt'), 'a prompt is missing');
    });
    await check('calls a tool', async () => {
        equal(await call(client, 'test_simple_text'), 'This is a simple text response for testing.');
    });
    await check("gets a tool's error as a result", async () => {
        const result = await client.callTool({ name: 'test_error_handling', arguments: {} });
        equal(result.isError, true);
    });
    await check('reads a resource and a template', async () => {
        const { contents } = await client.readResource({ uri: 'test://static-text' });
        equal(contents[0].text, 'This is the content of the static text resource.');
        const filled = await client.readResource({ uri: 'test://template/7/data' });
        equal(JSON.parse(filled.contents[0].text).id, '7');
    });
    await check('gets a prompt and a completion', async () => {
        const { messages } = await client.getPrompt({
            name: 'test_prompt_with_arguments',
            arguments: { arg1: 'one', arg2: 'two' },
        });
        equal(messages[0].content.text, "Prompt with arguments: arg1='one', arg2='two'");
        const { completion } = await client.complete({
            ref: { type: 'ref/prompt', name: 'test_prompt_with_arguments' },
            argument: { name: 'arg1', value: 'par' },
        });
        equal(completion.values, ['paris', 'park', 'party']);
    });
    await check('gets progress in order, then the result', () => progress(client));
    await check('gets the right answer to each of many calls at once', async () => {
        const ids = Array.from({ length: 24 }, (_, index) => String(index));
        const said = await Promise.all(
            ids.map(id => client.readResource({ uri: `test://template/${id}/data` }, { cacheMode: 'bypass' })),
        );
        equal(said.map(result => JSON.parse(result.contents[0].text).id), ids);
        await Promise.all(Array.from({ length: 6 }, () => progress(client)));
    });
    await check(`is served by ${nodes} processes`, async () => {
        const seen = new Set();
        for (let turn = 0; turn < 4 * Number(nodes); turn += 1) seen.add(await call(client, 'test_node'));
        equal(seen.size, Number(nodes));
    });
}

async function legacy() {
    const client = make('legacy');
    const transport = open();
    await check('opens a session', async () => {
        await client.connect(transport);
        equal(client.getProtocolEra(), 'legacy');
        equal(client.getNegotiatedProtocolVersion(), mode);
        holds(transport.sessionId, 'there is no session id');
    });
    if (failures) return;
    await common(client);
    await check('pings the server', () => client.ping());
    await check('gets log messages in order', async () => {
        await client.setLoggingLevel('debug');
        await call(client, 'test_tool_with_logging');
        equal(await inbox.logs.take(3), ['Tool execution started', 'Tool processing data', 'Tool execution completed']);
    });
    await check('answers sampling', async () => {
        equal(await call(client, 'test_sampling', { prompt: 'hello' }), 'LLM response: Echo: hello');
    });
    await check('answers elicitation', async () => {
        const said = await call(client, 'test_elicitation', { message: 'Who?' });
        equal(said, 'User response: action=accept, content={"username": "my username", "email": "my email"}');
    });
    await check('answers roots and ping, which come on the standalone stream', async () => {
        equal(await call(client, 'test_list_roots'), ROOT.uri);
        equal(await call(client, 'test_ping_client'), 'pong');
    });
    await check('answers several servers requests at once, each its own', async () => {
        const prompts = Array.from({ length: 9 }, (_, index) => `prompt ${index}`);
        const said = await Promise.all(prompts.map(prompt => call(client, 'test_sampling', { prompt })));
        equal(said, prompts.map(prompt => `LLM response: Echo: ${prompt}`));
    });
    await check('hears of a resource and of the tools on the standalone stream', async () => {
        await client.subscribeResource({ uri: WATCHED });
        await call(client, 'test_trigger_resource_update');
        holds((await inbox.updates.take(1)).includes(WATCHED), 'another resource was updated');
        await client.unsubscribeResource({ uri: WATCHED });
        await call(client, 'test_trigger_tool_change');
        await inbox.tools.take(1);
    });
    await check('comes back for an answer when the server has closed the stream', async () => {
        const before = wire.resumes();
        equal(await call(client, 'test_reconnection'), 'Reconnection test completed successfully');
        equal(wire.resumes() > before, PRIMED);
    });
    await check('misses nothing when the network breaks in the middle of a call', async () => {
        const before = wire.resumes();
        wire.cutNextAfter(1);
        await progress(client);
        holds(wire.resumes() > before, 'the client did not have to come back');
    });
    await check('goes on with the session from another transport', async () => {
        const other = make('legacy');
        const again = open({ sessionId: transport.sessionId, protocolVersion: client.getNegotiatedProtocolVersion() });
        await other.connect(again);
        equal(await call(other, 'test_sampling', { prompt: 'again' }), 'LLM response: Echo: again');
        await other.close();
    });
    await check('ends the session everywhere', async () => {
        const headers = {
            'content-type': 'application/json',
            accept: 'application/json, text/event-stream',
            'mcp-session-id': transport.sessionId,
            'mcp-protocol-version': mode,
        };
        await transport.terminateSession();
        equal(transport.sessionId, undefined);
        for (let turn = 0; turn < 2 * Number(nodes); turn += 1) {
            const body = JSON.stringify({ jsonrpc: '2.0', id: 1, method: 'ping' });
            equal((await fetch(url, { method: 'POST', headers, body })).status, 404);
        }
    });
    await client.close();
}

async function auto() {
    const client = make('auto');
    await check('finds out that there is no handshake', async () => {
        await client.connect(open());
        equal(client.getProtocolEra(), 'modern');
        equal(client.getNegotiatedProtocolVersion(), '2026-07-28');
    });
    if (failures) return;
    await common(client);
    await check('gets log messages where it asks for them', async () => {
        await client.callTool({
            name: 'test_tool_with_logging',
            arguments: {},
            _meta: { 'io.modelcontextprotocol/logLevel': 'info' },
        });
        equal(await inbox.logs.take(3), ['Tool execution started', 'Tool processing data', 'Tool execution completed']);
    });
    await check('answers what a result asks for', async () => {
        const ask = name => call(client, `test_input_required_result_${name}`);
        equal(await ask('elicitation'), 'Hello, my name!');
        equal(await ask('sampling'), 'Echo: What is the capital of France?');
        equal(await ask('list_roots'), ROOT.uri);
        equal(await ask('multiple_inputs'), 'Greeted my name, who has 1 roots');
        const prompt = await client.getPrompt({ name: 'test_input_required_result_prompt' });
        equal(prompt.messages[0].content.text, 'Use this context: my context');
    });
    await check('has its request state accepted by whichever node gets it', async () => {
        for (let turn = 0; turn < 2 * Number(nodes); turn += 1) {
            equal(await call(client, 'test_input_required_result_request_state'), 'state-ok');
            equal(await call(client, 'test_input_required_result_multi_round'), 'my name likes my color');
        }
    });
    await check('hears of a resource and of the tools, whichever node changed them', async () => {
        const subscription = await client.listen({ toolsListChanged: true, resourceSubscriptions: [WATCHED] });
        for (let turn = 0; turn < Number(nodes); turn += 1) {
            await call(client, 'test_trigger_resource_update');
            equal(await inbox.updates.take(1), [WATCHED]);
            await call(client, 'test_trigger_tool_change');
            equal(await inbox.tools.take(1), ['changed']);
        }
        await subscription.close();
    });
    await client.close();
}

await (mode === 'auto' ? auto() : legacy());
console.log(failures ? `${failures} checks failed` : 'all checks passed');
process.exit(failures ? 1 : 0);
