// Asks the server at argv[2] through OpenAI's client and Vercel's AI SDK, and prints what came as JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const baseURL = process.argv[2];
const CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>';
const saying = (text) => ({ structured_outputs: { choice: [text] } });
const messages = [{ role: "user", content: "Hi" }];
const found = {};

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const schema = z.strictObject({ city: z.enum(["Rome", "Oslo"]), rains: z.boolean() });
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Rome", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters } }];

found.models = (await client.models.list()).data.map((model) => model.id);
const whole = await client.chat.completions.create({ model: "demo", messages, ...saying("Light.") });
found.text = whole.choices[0].message.content;
found.streamed = "";
for await (const chunk of await client.chat.completions.create({
  model: "demo", messages, stream: true, ...saying("Light."),
})) found.streamed += chunk.choices[0]?.delta?.content ?? "";
const runner = client.chat.completions.stream({ model: "demo", messages, tools, ...saying(CALL) });
found.streamedCall = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0].function;
const response = client.responses.stream({ model: "demo", input: "Hi", ...saying("Light.") });
found.response = (await response.finalResponse()).output_text;
found.refused = await client.chat.completions
  .create({ model: "other", messages })
  .catch((error) => ({ status: error.status, code: error.code }));

// The AI SDK passes further fields on under the provider's name.
const provider = createOpenAICompatible({ name: "jaxinfer", baseURL, supportsStructuredOutputs: true, includeUsage: true });
const model = provider("demo");
const aiTools = {
  weather: tool({
    description: "The weather in a city.",
    inputSchema: z.strictObject({ city: z.enum(["Rome", "Oslo"]) }),
    execute: async ({ city }) => `sun in ${city}`,
  }),
};
const passing = (text) => ({ providerOptions: { jaxinfer: saying(text) } });
const asked = { model, prompt: "Hi", maxRetries: 0, temperature: 1, seed: 1, maxOutputTokens: 200 };

const generated = await generateText({ ...asked, ...passing("<think>Hm.</think>Light.") });
found.ai = { text: generated.text, reasoning: generated.reasoningText, tokens: generated.usage.outputTokens };
const stream = streamText({ ...asked, ...passing("Light.") });
found.aiStream = { text: "" };
for await (const piece of stream.textStream) found.aiStream.text += piece;
found.aiStream.tokens = (await stream.usage).outputTokens;
found.aiStream.reason = await stream.finishReason;
const round = await generateText({
  ...asked,
  tools: aiTools,
  stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber, messages }) => ({ messages, ...passing(stepNumber === 0 ? CALL : "Sun.") }),
});
found.aiRound = { calls: round.steps[0].toolCalls.map((call) => call.input), results: round.steps[0].toolResults.map((one) => one.output), text: round.text };
const forced = await generateText({ ...asked, tools: aiTools, toolChoice: "required" });
found.aiForced = forced.toolCalls.map((call) => call.input);
const calling = streamText({ ...asked, tools: aiTools, ...passing(CALL) });
await calling.consumeStream();
found.aiStreamedCall = (await calling.toolCalls).map((call) => call.input);
found.aiObject = (await generateObject({ ...asked, schema })).object;
const growing = streamObject({ ...asked, schema });
for await (const piece of growing.partialObjectStream) found.aiStreamedObject = piece;
found.aiStreamedObject = await growing.object;
console.log(JSON.stringify(found));
